"""TRL's trainers with this package's passes, log-probs, entropies and losses inside: `accelerate_trainer`.

TRL's trainers call their model with `fused_lm_head=True` and get a `FusedCausalLMOutput`: log-probs and what their
metrics need, per token. That forward is replaced, on the models of one trainer. Data, rollouts, rewards, advantages,
metrics, optimizer and checkpoints stay TRL's. RewardTrainer's model is a sequence classifier; its scores come from a
packed pass.

Left out: sharded models, encoder-decoders, models of images.
"""

from functools import partial
from importlib.metadata import version
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.integrations.forwards import (
    Replaced,
    ask_routers,
    distribution_of,
    language_fields,
    pooled_scores,
    summed_loss,
)
from rlhf_fast.integrations.head import Distribution
from rlhf_fast.integrations.refusals import (
    MARK,
    base_model,
    compare,
    of_short_row,
    refuse_head,
    refuse_model,
    refuse_trainer,
)
from rlhf_fast.lm.private import GenericForSequenceClassification

VERSION = "1.16"
TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RLOOTrainer", "GRPOTrainer", "RewardTrainer")
FIELDS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
"""What a head may be asked for besides log-probs."""


class Accelerated:
    """A trainer that `accelerate_trainer` has changed. As a context manager it restores the trainer at its end."""

    def __init__(self, trainer: Any, forwards: list[tuple[PreTrainedModel, Any]]) -> None:
        # accelerate hangs its autocast on a model's forward, which ours replaces
        autocast = trainer.accelerator.autocast
        self.trainer, self._replaced = trainer, [Replaced(model, forward, autocast) for model, forward in forwards]
        setattr(trainer, MARK, self)

    def restore(self) -> None:
        """The trainer computes everything itself again."""
        for each in self._replaced:
            each.restore()
        if getattr(self.trainer, MARK, None) is self:
            delattr(self.trainer, MARK)

    def __enter__(self) -> "Accelerated":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


def accelerate_trainer(trainer: Any, *, packed: bool = True) -> Accelerated:
    """Make one trainer of TRL 1.16 compute its log-probs, entropies and losses by this package.

    Plain TRL: the same numbers, up to the rounding of float32. Call it after the trainer is made and before `train`::

        trainer = SFTTrainer(model, args=SFTConfig(..., gradient_checkpointing=False), train_dataset=rows)
        accelerate_trainer(trainer)
        trainer.train()

    Args:
        trainer: SFTTrainer, DPOTrainer, KTOTrainer, RLOOTrainer, GRPOTrainer or RewardTrainer, or a subclass of one.
            Other trainers in the same process keep what they have, unless they train the same model object.
        packed: run the layers on the real tokens alone, with fused norms, MLPs and rotary embeddings. That needs a
            model without gradient checkpointing, which TRL turns on by default, and a CPU. Where a model or a batch
            does not fit, the model's own layers run, and a warning says so once. With dropout in the model, a packed
            pass draws other random masks.

    Returns:
        Accelerated: `restore()` undoes the change, and so does the end of a `with` block.

    Raises:
        ValueError: another trainer or version of TRL; a trainer that was changed already; `use_liger_kernel`,
            `torch_compile`, `activation_offloading`, DeepSpeed, FSDP or another sharding, several devices; an
            encoder-decoder; a model of images; a last layer whose numbers this package does not reproduce.
    """
    kind = _kind(trainer)
    refuse_trainer(trainer)
    model = base_model(trainer.model)
    refuse_model(model)
    if kind == "RewardTrainer":
        forwards = [(_classifier(model), pooled_scores)] if packed else []
        return Accelerated(trainer, forwards)
    temperature = getattr(trainer, "temperature", None) if kind in ("RLOOTrainer", "GRPOTrainer") else 1.0
    in_fp32 = bool(getattr(trainer.args, "cast_lm_head_to_fp32", False))
    heads = [(model, kind == "SFTTrainer" and trainer.args.loss_type == "nll")]
    if getattr(trainer, "ref_model", None) is not None:
        reference = base_model(trainer.accelerator.unwrap_model(trainer.ref_model, keep_fp32_wrapper=True))
        refuse_model(reference)
        heads.append((reference, False))
    forwards: list[tuple[PreTrainedModel, Any]] = []
    for part, summed in heads:
        refuse_head(part)
        theirs = of_short_row(part, partial(part, fused_lm_head=True))
        names = tuple(name for name in FIELDS if name in theirs)
        distribution = distribution_of(part.config, float(temperature or 1.0))._replace(in_fp32=in_fp32)
        forward = _fused_forward(distribution, names, summed, packed)
        ours = of_short_row(part, partial(forward, part, fused_lm_head=True))
        compared = ("log_probs", *(name for name in names if name != "is_top1"))
        compare(part, theirs, ours, compared, "TRL's", half=trainer.accelerator.mixed_precision != "no")
        forwards.append((part, forward))
    return Accelerated(trainer, forwards)


def _kind(trainer: Any) -> str:
    """The name of the class of TRL that the trainer is of."""
    import trl  # pyright: ignore[reportMissingImports]

    name = f"{type(trainer).__module__}.{type(trainer).__qualname__}"
    if not version("trl").startswith(f"{VERSION}."):
        raise ValueError(f"trainer: expected a trainer of TRL {VERSION}, got TRL {version('trl')}")
    for kind in TRAINERS:
        if isinstance(trainer, getattr(trl, kind)):
            return kind
    raise ValueError(f"trainer: expected one of TRL's {', '.join(TRAINERS)}, got {name}")


def _classifier(model: PreTrainedModel) -> PreTrainedModel:
    if not isinstance(model, GenericForSequenceClassification):
        name = type(model).__name__
        raise ValueError(f"trainer.model: expected transformers' generic classifier of sequences, got {name}")
    return model


def _fused_forward(distribution: Distribution, names: tuple[str, ...], summed: bool, pack: bool) -> Any:
    """The forward behind `fused_lm_head=True`, as `trl.trainer.utils.add_fused_lm_head` describes it."""
    from trl.trainer.utils import FusedCausalLMOutput  # pyright: ignore[reportMissingImports]

    def forward(
        model: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        read = labels if shift_labels is None else shift_labels
        if not fused_lm_head or read is None:
            return NotImplemented
        kwargs["use_cache"] = False
        ask_routers(model, kwargs)
        fields, mask, outputs = language_fields(
            model, args, kwargs, read, distribution, names, shifted=shift_labels is not None, summed=summed, pack=pack
        )
        loss, aux_loss = summed_loss(model, fields["log_probs"], mask, num_items_in_batch, kwargs, outputs)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    return forward
