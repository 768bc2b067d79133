"""What does not fit is refused in one line, before anything is changed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.lm.precision import HALVES
from rlhf_fast.lm.switches import trial_rows

MARK = "_rlhf_fast"
"""The attribute of a trainer that was changed."""


def base_model(model: Any) -> PreTrainedModel:
    """The model of transformers in peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def refuse_trainer(trainer: Any) -> None:
    """Raises where a trainer runs its model in a way that a replaced forward does not bear."""
    args, accelerator = trainer.args, trainer.accelerator
    if hasattr(trainer, MARK):
        raise ValueError("trainer: expected a trainer that was not accelerated yet; call restore() first")
    if args.use_liger_kernel:
        raise ValueError("trainer: expected use_liger_kernel=False, because Liger replaces the same layers, got True")
    if args.torch_compile:
        raise ValueError("trainer: expected torch_compile=False, because losses run eagerly, got True")
    if getattr(args, "activation_offloading", False):  # of TRL
        raise ValueError(
            "trainer: expected activation_offloading=False, because it has not been tried with this package, got True"
        )
    if args.n_gpu > 1:
        raise ValueError(f"trainer: expected one device a process, got {args.n_gpu}; start it by torchrun")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for sharding, found in {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "tensor, context or sequence parallelism": parallelism is not None and parallelism.total_size > 1,
    }.items():
        if found:
            raise ValueError(f"trainer: expected whole weights in every process, got {sharding}")


def refuse_model(model: PreTrainedModel) -> None:
    """Raises for a model that is no decoder of text, or whose weights are not all here."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"trainer.model: expected a decoder, got the encoder-decoder {name}")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"trainer.model: expected a model of text alone, got {name}")
    places = {str(place): None for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise ValueError(f"trainer.model: expected all weights on one device, got a device map of {', '.join(places)}")
    if any(hasattr(weight, "full_tensor") for weight in model.parameters()):
        raise ValueError("trainer.model: expected whole weights in every process, got DTensors")


def refuse_head(model: PreTrainedModel) -> None:
    """Raises for a last layer whose weight alone does not say the logits."""
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if hasattr(head, "lora_A"):
        raise ValueError("trainer.model: expected no adapter on the last layer, whose weight alone the losses read")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        got = type(head).__name__ if weight is None else f"{type(head).__name__} of {weight.dtype}"
        raise ValueError(f"trainer.model: expected a last layer with a floating-point weight [V, H], got {got}")


@torch.no_grad()
def of_short_row(model: PreTrainedModel, forward: Callable[..., Any]) -> Any:
    """What a forward of the model, function of (**inputs), makes of a short row with labels."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        (row,) = trial_rows(model, (12,))
        return forward(input_ids=row, attention_mask=torch.ones_like(row), labels=row)
    finally:
        for module in training:
            module.training = True


def compare(model: PreTrainedModel, theirs: Any, ours: Any, names: tuple[str, ...], whose: str, *, half: bool) -> None:
    """Raises where the outputs of two forwards for one row differ.

    names: of the outputs. whose: in the error, such as "TRL's". half: the model's forward may run in bf16.
    """
    tolerance = 5e-2 if half or next(model.parameters()).dtype in HALVES else 1e-3
    for name in names:
        if not torch.allclose(ours[name].float(), theirs[name].float(), tolerance, tolerance):
            got = f"{float((ours[name] - theirs[name]).abs().max()):.2g}"
            raise ValueError(f"trainer.model: expected {whose} {name} on a short row, got numbers that differ by {got}")
