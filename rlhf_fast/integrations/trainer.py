"""SFT by transformers' own Trainer with this package's passes and loss: `FusedTrainer`, or `sft_loss` alone."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlhf_fast.integrations.forwards import Replaced, ask_routers, distribution_of, language_fields, summed_loss
from rlhf_fast.integrations.refusals import (
    base_model,
    compare,
    of_short_row,
    refuse_head,
    refuse_model,
    refuse_trainer,
)
from rlhf_fast.ops import token_logprobs
from rlhf_fast.ops.reference import IGNORED_ID


class FusedTrainer(Trainer):
    """transformers' Trainer for a causal language model, whose training loss never holds [B, L, V] logits.

    Takes what Trainer takes::

        trainer = FusedTrainer(model, args=TrainingArguments(...), train_dataset=rows, data_collator=collator)
        trainer.train()

    The loss is Trainer's, up to the rounding of float32: -sum of log-probs of the labels that are not -100, divided by
    `num_items_in_batch`, with `label_smoothing_factor` and gradient accumulation as in Trainer. Rows are packed without
    padding on a CPU where the model has no gradient checkpointing. With dropout a packed pass draws other random masks.
    Evaluation, and a `compute_loss_func` of your own, read logits as in Trainer.

    Raises:
        ValueError: an encoder-decoder, a model of images, `use_liger_kernel`, `torch_compile`, DeepSpeed, FSDP or
            another sharding, several devices; `label_smoothing_factor` with a model whose logits have a soft cap; a
            model whose loss on a short row is another.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        model = base_model(self.model)
        refuse_trainer(self)
        refuse_model(model)
        refuse_head(model)
        distribution, smoothing = distribution_of(model.config, 1.0), self.args.label_smoothing_factor
        if smoothing and distribution.softcap is not None:
            raise ValueError(
                f"label_smoothing_factor: expected 0 for a model whose logits have a soft cap, got {smoothing}"
            )

        def forward(
            model: PreTrainedModel,
            *args: Any,
            fused_loss: bool = False,
            labels: Tensor | None = None,
            shift_labels: Tensor | None = None,
            num_items_in_batch: Tensor | int | None = None,
            **inputs: Any,
        ) -> Any:
            read = labels if shift_labels is None else shift_labels
            if not fused_loss or read is None:
                return NotImplemented
            inputs["use_cache"] = False
            ask_routers(model, inputs)
            names, shifted = ("margin",) if smoothing else (), shift_labels is not None
            fields, counted, outputs = language_fields(
                model, args, inputs, read, distribution, names, shifted=shifted, summed=True
            )
            loss, _ = summed_loss(model, fields["log_probs"], counted, num_items_in_batch, inputs, outputs)
            if smoothing:  # (1 - e) (log Z - z_t) + e (log Z - mean z) = -log p + e (z_t - mean z)
                count = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
                loss = loss + smoothing * fields["margin"].sum() / count
            return CausalLMOutputWithPast(loss=loss)

        if not smoothing:  # transformers' smoothed loss is no output of the model
            half = self.accelerator.mixed_precision != "no"
            theirs, ours = (of_short_row(model, each) for each in (model, partial(forward, model, fused_loss=True)))
            compare(model, theirs, ours, ("loss",), "its own", half=half)
        autocast: Any = self.accelerator.autocast  # which accelerate hangs on the model's forward
        self._replaced = Replaced(model, forward, autocast)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; the training loss comes from hidden states."""
        options: dict[str, Any] = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if return_outputs or "labels" not in inputs or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, **options)
        smoother, self.label_smoother = self.label_smoother, None  # which would ask for logits
        try:
            return super().compute_loss(model, {**inputs, "fused_loss": True}, **options)
        finally:
            self.label_smoother = smoother


def sft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """A `compute_loss_func` for Trainer: the cross-entropy of next tokens from the logits, in one pass over these.

    The backward pass writes the logits' gradient over the logits, so that no second [B, L, V] tensor exists. Use
    `FusedTrainer` where you can: it has no first.

    Plain PyTorch: ``cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")``
    divided by num_items_in_batch.

    Args:
        outputs: of the model; its "logits" [B, L, V], which nothing else may read afterwards.
        labels: [B, L] int64, -100 where nothing counts.
        num_items_in_batch: the number of labels in the whole batch; None for their number here.

    Raises:
        ValueError: as `token_logprobs`.
    """
    ids = F.pad(labels[:, 1:], (0, 1), value=IGNORED_ID)
    logprobs = token_logprobs(outputs["logits"], ids.to(outputs["logits"].device), inplace_backward=True).logprobs
    count = (ids != IGNORED_ID).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return -logprobs.sum() / (count.to(logprobs.device) if isinstance(count, torch.Tensor) else count)
