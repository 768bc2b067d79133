"""TRL's trainers with this package's passes, log-probs, entropies and losses inside: `accelerate_trainer`.

TRL's trainers call their model with `fused_lm_head=True` and get a `FusedCausalLMOutput`: log-probs and what their
metrics need, per token. That forward is replaced, on the models of one trainer. Data, rollouts, rewards, advantages,
metrics, optimizer and checkpoints stay TRL's. RewardTrainer's model is a sequence classifier; its scores come from a
packed pass.

Left out: sharded models, encoder-decoders, models of images.
"""

from importlib.metadata import version
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.integrations.forwards import Replaced, distribution_of, language_fields, pooled_scores
from rlhf_fast.lm.precision import HALVES
from rlhf_fast.lm.private import GenericForSequenceClassification
from rlhf_fast.lm.switches import trial_rows

VERSION = "1.16"
FIELDS = {
    "SFTTrainer": ("entropy", "is_top1"),
    "DPOTrainer": ("entropy", "mean_logits", "is_top1"),
    "KTOTrainer": ("entropy", "mean_logits"),
    "RLOOTrainer": ("entropy",),
    "GRPOTrainer": ("entropy",),
}
"""What each trainer asks of its policy's head besides log-probs. A reference is asked for log-probs alone."""
_MARK = "_rlhf_fast"


class Accelerated:
    """A trainer that `accelerate_trainer` has changed. As a context manager it restores the trainer at its end."""

    def __init__(self, trainer: Any, forwards: list[tuple[PreTrainedModel, Any]]) -> None:
        # accelerate hangs its autocast on a model's forward, which ours replaces
        autocast = trainer.accelerator.autocast
        self.trainer, self._replaced = trainer, [Replaced(model, forward, autocast) for model, forward in forwards]
        setattr(trainer, _MARK, self)

    def restore(self) -> None:
        """The trainer computes everything itself again."""
        for each in self._replaced:
            each.restore()
        if getattr(self.trainer, _MARK, None) is self:
            delattr(self.trainer, _MARK)

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
            `torch_compile`, DeepSpeed, FSDP or another sharding; an encoder-decoder; a model of images; a last layer
            whose numbers this package does not reproduce.
    """
    kind = _kind(trainer)
    _refuse(trainer)
    model = _base(trainer.model)
    _refuse_model(model)
    if kind == "RewardTrainer":
        forwards = [(_classifier(model), pooled_scores)] if packed else []
        return Accelerated(trainer, forwards)
    names = FIELDS[kind] + (("log_sum_sq_probs",) if getattr(trainer, "use_weighting", False) else ())
    temperature = getattr(trainer, "temperature", None) if kind in ("RLOOTrainer", "GRPOTrainer") else 1.0
    summed = kind == "SFTTrainer" and trainer.args.loss_type == "nll"
    heads = [(model, names, summed)]
    if getattr(trainer, "ref_model", None) is not None:
        reference = _base(trainer.accelerator.unwrap_model(trainer.ref_model, keep_fp32_wrapper=True))
        heads.append((reference, (), False))
    forwards: list[tuple[PreTrainedModel, Any]] = []
    for part, asked, sums in heads:
        _refuse_head(part)
        forward = _fused_forward(part, float(temperature or 1.0), asked, sums, packed)
        _compare(part, forward, asked, half=trainer.accelerator.mixed_precision != "no")
        forwards.append((part, forward))
    return Accelerated(trainer, forwards)


def _kind(trainer: Any) -> str:
    """The name of the class of TRL that the trainer is of."""
    import trl

    name = f"{type(trainer).__module__}.{type(trainer).__qualname__}"
    known = (*FIELDS, "RewardTrainer")
    if not version("trl").startswith(f"{VERSION}."):
        raise ValueError(f"trainer: expected a trainer of TRL {VERSION}, got TRL {version('trl')}")
    for kind in known:
        if isinstance(trainer, getattr(trl, kind)):
            return kind
    raise ValueError(f"trainer: expected one of TRL's {', '.join(known)}, got {name}")


def _refuse(trainer: Any) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    if hasattr(trainer, _MARK):
        raise ValueError("trainer: expected a trainer that was not accelerated yet; call restore() first")
    if args.use_liger_kernel:
        raise ValueError("trainer: expected use_liger_kernel=False, because Liger replaces the same layers, got True")
    if args.torch_compile:
        raise ValueError("trainer: expected torch_compile=False, because losses run eagerly, got True")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for sharding, found in {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "tensor, context or sequence parallelism": parallelism is not None and parallelism.total_size > 1,
    }.items():
        if found:
            raise ValueError(f"trainer: expected whole weights in every process, got {sharding}")


def _refuse_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"trainer.model: expected a decoder, got the encoder-decoder {name}")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"trainer.model: expected a model of text alone, got {name}")


def _refuse_head(model: PreTrainedModel) -> None:
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if hasattr(head, "lora_A"):
        raise ValueError("trainer.model: expected no adapter on the last layer, whose weight alone the losses read")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        got = type(head).__name__ if weight is None else f"{type(head).__name__} of {weight.dtype}"
        raise ValueError(f"trainer.model: expected a last layer with a floating-point weight [V, H], got {got}")


def _classifier(model: PreTrainedModel) -> PreTrainedModel:
    if not isinstance(model, GenericForSequenceClassification):
        name = type(model).__name__
        raise ValueError(f"trainer.model: expected transformers' generic classifier of sequences, got {name}")
    return model


def _base(model: Any) -> PreTrainedModel:
    """The model of transformers in peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _fused_forward(model: PreTrainedModel, temperature: float, names: tuple[str, ...], summed: bool, pack: bool) -> Any:
    """The forward behind `fused_lm_head=True`, as `trl.trainer.utils.add_fused_lm_head` describes it."""
    from trl.trainer.utils import FusedCausalLMOutput

    text = model.config.get_text_config()
    distribution = distribution_of(model.config, temperature)

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
        if getattr(text, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        fields, mask, outputs = language_fields(
            model, args, kwargs, read, distribution, names, shifted=shift_labels is not None, summed=summed, pack=pack
        )
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -fields["log_probs"].sum() / count, None
        if kwargs.get("output_router_logits"):
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            aux_loss = load_balancing_loss_func(
                outputs.router_logits, text.num_experts, text.num_experts_per_tok, kwargs.get("attention_mask")
            )
            loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    return forward


@torch.no_grad()
def _compare(model: PreTrainedModel, forward: Any, names: tuple[str, ...], *, half: bool) -> None:
    """Raises where the fields of a short row are not those that TRL's own head has. half: that head may run in bf16."""
    if next(model.parameters()).is_meta:
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        (row,) = trial_rows(model, (12,))
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row, "fused_lm_head": True}
        theirs, ours = model(**inputs), forward(model, **inputs)
    finally:
        for module in training:
            module.training = True
    tolerance = 5e-2 if half or next(model.parameters()).dtype in HALVES else 1e-3
    for name in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs"):
        if name in ("log_probs", *names) and not torch.allclose(ours[name], theirs[name].float(), tolerance, tolerance):
            got = f"{float((ours[name] - theirs[name]).abs().max()):.2g}"
            raise ValueError(f"trainer.model: expected TRL's {name} on a short row, got numbers that differ by {got}")
