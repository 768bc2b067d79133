"""The models of a method, how many parameters each has, and the bytes it holds as long as the run lasts.

With AdamW a trained parameter costs 16 bytes, in either layout: fp32 weight 4 + gradient 4 + two moments 8, or bf16
weight 2 + gradient 2 + fp32 master weight 4 + two moments 8. A frozen one costs 4 or 2. ZeRO divides by the number of
GPUs: the optimizer's part (stage 1), the gradients' (2) and the weights' (3).
"""

from typing import NamedTuple

import torch
from transformers.configuration_utils import PreTrainedConfig

from rlhf_fast.lm.adapters import base_path
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.shapes import DTYPES, Head, Shape, layers_of, period, read_config


class Counts(NamedTuple):
    """Numbers of parameters of a model."""

    all: int
    trainable: int  # adapters and score head under LoRA
    layer: int  # the largest layer's
    outside: int  # the largest matrix outside the layers, an embedding


class Role(NamedTuple):
    """A model of a run."""

    shape: Shape
    counts: Counts
    own: int  # parameters not held by another role
    trained: int
    frozen: bool  # reference or reward: may be offloaded

    @property
    def gathered_bytes(self) -> int:
        """Two layers (one in use, the next on its way) and the largest embedding: what ZeRO-3 gathers at a time."""
        return (2 * self.counts.layer + self.counts.outside) * self.shape.dtype.itemsize


class StaticBytes(NamedTuple):
    """Bytes that a role holds as long as the run lasts."""

    weights: int
    gradients: int
    optimizer: int


def roles_of(plan: PlanConfig) -> dict[str, Role]:
    """Role -> model, as the table of training stages lists them: trained ones first."""
    configs: dict[str, PreTrainedConfig] = {}
    counted: dict[tuple, Counts] = {}

    def role(head: Head, source: str | None, *, trained: bool, on_base: bool = False) -> Role:
        source = source or plan.model
        if source not in configs:
            configs[source] = read_config(source)
        rank = plan.lora_rank if trained or on_base else 0
        checkpointing = plan.gradient_checkpointing and trained
        shape = Shape(configs[source], head, DTYPES[plan.dtype], plan.bf16, trained, checkpointing, rank)
        if (source, head, rank) not in counted:
            counted[source, head, rank] = _count(shape._replace(trained=True))
        counts = counted[source, head, rank]
        own = counts.trainable if on_base else counts.all
        return Role(shape, counts, own, counts.trainable if trained else 0, frozen=not trained)

    main, *others = plan.stage.roles
    roles = {main: role("score" if main == "reward" else "policy", None, trained=True)}
    has_reward = "reward" in others and plan.reward != "none"
    if plan.shared_critic:
        width = roles["policy"].shape.config.get_text_config().hidden_size
        roles["value"] = roles["policy"]._replace(own=width, trained=width)
    elif "value" in others:
        source = plan.critic if plan.critic != "same" else plan.reward if has_reward else None
        roles["value"] = role("score", source, trained=True, on_base=plan.share_base)
        sizes = [roles[name].shape.config.get_text_config().vocab_size for name in ("policy", "value")]
        if sizes[0] != sizes[1]:
            raise ValueError(f"critic: expected the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]}")
    if has_reward:
        roles["reward"] = role("score", plan.reward, trained=False, on_base=plan.share_base)
    if "reference" in others:
        roles["reference"] = role("policy", plan.reference, trained=False)
        if plan.lora_rank and base_path(plan.reference or plan.model) == base_path(plan.model):
            roles["reference"] = roles["reference"]._replace(own=0)  # the policy's base, adapters off
    return roles


def _count(shape: Shape) -> Counts:
    model = shape.build()
    layers = layers_of(model)
    sizes, unit = [sum(p.numel() for p in layer.parameters()) for layer in layers], period(shape.config)
    if any(size != sizes[i % unit] for i, size in enumerate(sizes)):  # passes are simulated on a few of them
        raise ValueError(f"model: expected layers of equal size, or of a repeating pattern of {unit}, got {sizes}")
    inside = {id(p) for p in layers.parameters()}
    return Counts(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        max(sizes),
        max(p.numel() for p in model.parameters() if id(p) not in inside),
    )


def bytes_per_trained(plan: PlanConfig) -> tuple[float, float]:
    """Gradient and optimizer bytes of one trained parameter."""
    dtype = DTYPES[plan.dtype]
    moments = 8.0 if plan.optimizer == "adamw" else 2 + 2 * 4 / 256  # a byte each, an fp32 scale per 256 of them
    master = 0 if dtype == torch.float32 else 4
    return (0 if plan.optimizer_in_backward else dtype.itemsize), moments + master


def zero_stage(role: Role, plan: PlanConfig) -> int:
    """The ZeRO stage of a role; of a frozen model only the weights can be split."""
    if not role.frozen:
        return plan.zero
    return (3 if plan.zero == 3 else 0) if plan.frozen_zero is None else plan.frozen_zero


def static_bytes(role: Role, plan: PlanConfig) -> StaticBytes:
    """Bytes of a role per GPU; they lie on the GPU or, where they are offloaded, in CPU memory."""
    zero = zero_stage(role, plan)
    gradient, optimizer = bytes_per_trained(plan)
    return StaticBytes(
        _share(role.own * role.shape.dtype.itemsize, plan.gpus if zero >= 3 else 1),
        _share(role.trained * gradient, plan.gpus if zero >= 2 else 1),
        _share(role.trained * optimizer, plan.gpus if zero >= 1 else 1),
    )


def _share(size: float, gpus: int) -> int:
    return -(-round(size) // gpus)
