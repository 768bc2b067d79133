"""The models of a method, how many parameters each has, and the bytes it holds as long as the run lasts.

With AdamW a trained parameter costs 16 bytes, in either layout: fp32 weight 4 + gradient 4 + two moments 8, or bf16
weight 2 + gradient 2 + fp32 master weight 4 + two moments 8. A LoRA adapter is fp32 on a base in either dtype. A frozen
parameter costs 4 or 2; beside trained fp32 weights its bf16 passes run under autocast. ZeRO divides by the number of
GPUs: the optimizer's part (stage 1), the gradients' (2) and the weights' (3).
"""

from typing import NamedTuple

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from rlhf_fast.lm.adapters import base_path
from rlhf_fast.lm.dtypes import DTYPES
from rlhf_fast.lm.precision import HALVES, layers_of_a_trial
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.shapes import Head, Shape, layers_of, period, read_config


class Counts(NamedTuple):
    """Numbers of parameters of a model."""

    all: int
    trainable: int  # adapters and score head under LoRA
    layer: int  # the largest layer's
    outside: int  # the largest matrix outside the layers, an embedding
    trial: int  # bf16 parameters of the trunk that trials of fast paths copy to fp32, see `lm.precision`
    trial_head: int  # the same of a head that is not the embedding, which trials of decoding copy too


class Role(NamedTuple):
    """A model of a run."""

    shape: Shape
    counts: Counts
    own: int  # parameters not held by another role
    trained: int
    frozen: bool  # reference or reward: may be offloaded

    @property
    def weight_bytes(self) -> int:
        """Of the parameters that no other role holds. Adapters are fp32."""
        adapters = self.counts.trainable if self.own and self.shape.lora_rank else 0
        return (self.own - adapters) * self.shape.dtype.itemsize + adapters * 4

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
        # A model on the policy's base, an adapter's or the reference under LoRA, has the base's dtype.
        on_policy = on_base or (not trained and head == "policy" and _is_base(plan))
        weights = plan.dtype if trained or on_policy else plan.frozen_weights
        autocast = plan.bf16 or weights == "mixed"
        shape = Shape(configs[source], head, DTYPES[weights], autocast, trained, checkpointing, rank)
        key = (source, head, rank, weights)
        if key not in counted:
            counted[key] = _count(shape._replace(trained=True))
        counts = counted[key]
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
    if "reference" in others and not plan.reference_free:
        roles["reference"] = role("policy", plan.reference, trained=False)
        if _is_base(plan):
            roles["reference"] = roles["reference"]._replace(own=0)  # the policy's base, adapters off
    return roles


def _is_base(plan: PlanConfig) -> bool:
    """Whether the reference is the policy's base without the adapter."""
    same = base_path(plan.reference or plan.model) == base_path(plan.model)
    return bool(plan.lora_rank and same and plan.frozen_dtype in (None, plan.dtype))


def _count(shape: Shape) -> Counts:
    model = shape.build()
    layers = layers_of(model)
    sizes, unit = [sum(p.numel() for p in layer.parameters()) for layer in layers], period(shape.config)
    if any(size != sizes[i % unit] for i, size in enumerate(sizes)):  # passes are simulated on a few of them
        raise ValueError(f"model: expected layers of equal size, or of a repeating pattern of {unit}, got {sizes}")
    inside = {id(p) for p in layers.parameters()}
    left_out = layers[layers_of_a_trial(layers, shape.config.get_text_config()) :]
    uncopied = {id(p) for p in left_out.parameters()}

    def copied(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters() if p.dtype in HALVES and id(p) not in uncopied)

    return Counts(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        max(sizes),
        max(p.numel() for p in model.parameters() if id(p) not in inside),
        copied(model.base_model),
        copied(model) - copied(model.base_model),
    )


class Trained(NamedTuple):
    """Bytes of one trained parameter besides its weight."""

    gradient: float
    moments: float
    master: float  # fp32 copy of a bf16 weight, there before the first step

    @property
    def optimizer(self) -> float:
        return self.moments + self.master


def bytes_per_trained(plan: PlanConfig) -> Trained:
    """A trained parameter's bytes; adapters and the head that is trained with them are fp32."""
    moments = 8.0 if plan.optimizer == "adamw" else 2 + 2 * 4 / 256  # a byte each, an fp32 scale per 256 of them
    half = plan.dtype == "bf16" and not plan.lora_rank
    gradient = 0 if plan.optimizer_in_backward else 2 if half else 4
    return Trained(gradient, moments, 4 if half else 0)


def zero_stage(role: Role, plan: PlanConfig) -> int:
    """The ZeRO stage of a role; of a frozen model only the weights can be split."""
    if not role.frozen:
        return plan.zero
    return (3 if plan.zero == 3 else 0) if plan.frozen_zero is None else plan.frozen_zero


def static_bytes(role: Role, plan: PlanConfig) -> StaticBytes:
    """Bytes of a role per GPU; they lie on the GPU or, where they are offloaded, in CPU memory."""
    zero = zero_stage(role, plan)
    each = bytes_per_trained(plan)
    return StaticBytes(
        _share(role.weight_bytes, plan.gpus if zero >= 3 else 1),
        _share(role.trained * each.gradient, plan.gpus if zero >= 2 else 1),
        _share(role.trained * each.optimizer, plan.gpus if zero >= 1 else 1),
    )


def master_bytes(role: Role, plan: PlanConfig) -> int:
    """Of the optimizer's bytes per GPU, those that are there before the first step."""
    return _share(role.trained * bytes_per_trained(plan).master, plan.gpus if zero_stage(role, plan) >= 1 else 1)


def _share(size: float, gpus: int) -> int:
    return -(-round(size) // gpus)
