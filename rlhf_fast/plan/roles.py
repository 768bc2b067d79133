"""The models of a method, how many parameters each has, and the bytes it holds as long as the run lasts.

With AdamW a trained parameter costs 16 bytes, in either layout: fp32 weight 4 + gradient 4 + two moments 8, or bf16
weight 2 + gradient 2 + fp32 master weight 4 + two moments 8. A LoRA adapter is fp32 on a base in either dtype. A frozen
parameter costs 4 or 2; beside trained fp32 weights its bf16 passes run under autocast.

In shards a process keeps its rows of every weight, padded to equal parts, gradients like the weights, and states of its
own rows alone. Adapters are whole in every process. ZeRO, by which other trainers split, divides by the number of GPUs:
the optimizer's part (stage 1), the gradients' (2) and the weights' (3).
"""

from typing import NamedTuple

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from rlhf_fast.lm.adapters import base_path
from rlhf_fast.lm.dtypes import DTYPES
from rlhf_fast.lm.precision import HALVES, layers_of_a_trial
from rlhf_fast.lm.sharding import rows_of_part, stays_whole, units_of
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.shapes import Head, Shape, layers_of, period, read_config
from rlhf_fast.plan.spread import spread_of
from rlhf_fast.training.optimizers import MOMENT_BYTES


class Weight(NamedTuple):
    """A parameter of a model."""

    rows: int  # its first dimension, over which it is split
    row: int  # numbers of a row
    trainable: bool
    whole: bool  # in every process, also where the model is in shards
    unit: int  # which module's weights, of those that shards make whole together, it belongs to

    @property
    def numel(self) -> int:
        return self.rows * self.row

    def part(self, parts: int, rank: int) -> tuple[int, int]:
        """Numbers of its part in process `rank` of `parts`: its own numbers, and all that it keeps with padding."""
        own, kept = (self.rows, self.rows) if self.whole else rows_of_part(self.rows, parts, rank)
        return own * self.row, kept * self.row


class Counts(NamedTuple):
    """A model's parameters and their numbers."""

    weights: tuple[Weight, ...]
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
    weights: tuple[Weight, ...]  # those that no other role holds
    frozen: bool  # reference or reward: may be offloaded

    @property
    def own(self) -> int:
        """Numbers of the weights that no other role holds."""
        return sum(weight.numel for weight in self.weights)

    @property
    def trained_weights(self) -> list[Weight]:
        return [] if self.frozen else [weight for weight in self.weights if weight.trainable]

    @property
    def trained(self) -> int:
        return sum(weight.numel for weight in self.trained_weights)

    def itemsize(self, weight: Weight) -> int:
        """Bytes of one number of a weight. Adapters, and what is trained with them, are fp32."""
        return 4 if self.shape.lora_rank and weight.trainable else self.shape.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Of the weights that no other role holds."""
        return sum(weight.numel * self.itemsize(weight) for weight in self.weights)

    def whole_bytes(self, parts: int) -> int:
        """Of the whole weights that a model in shards has in passes without gradients, with the parts' padding."""
        split = [weight for weight in self.counts.weights if not weight.whole]
        return sum(parts * weight.part(parts, 0)[1] * self.itemsize(weight) for weight in split)

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
        own = tuple(weight for weight in counts.weights if weight.trainable or not on_base or apart(weight))
        return Role(shape, counts, own, frozen=not trained)

    def apart(weight: Weight) -> bool:
        """Whether a model in shards has parts of its own also of a base's weight, as `shared_parts.taken_over` says."""
        return plan.shard != "none" and weight.rows % spread_of(plan).parts > 0

    main, *others = plan.stage.roles
    roles = {main: role("score" if main == "reward" else "policy", None, trained=True)}
    has_reward = "reward" in others and plan.reward != "none"
    if plan.shared_critic:
        width = roles["policy"].shape.config.get_text_config().hidden_size
        roles["value"] = roles["policy"]._replace(weights=(Weight(1, width, trainable=True, whole=True, unit=0),))
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
        if _is_base(plan):  # the policy's base, adapters off
            roles["reference"] = roles["reference"]._replace(weights=tuple(filter(apart, roles["reference"].weights)))
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

    whole, units = {id(p) for p in stays_whole(model)}, dict[int, int]()
    for number, module in enumerate(units_of(model)):
        for parameter in module.parameters():
            units.setdefault(id(parameter), number)

    def copied(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters() if p.dtype in HALVES and id(p) not in uncopied)

    return Counts(
        tuple(_weight(p, id(p) in whole, units[id(p)]) for p in model.parameters()),
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        max(sizes),
        max(p.numel() for p in model.parameters() if id(p) not in inside),
        copied(model.base_model),
        copied(model) - copied(model.base_model),
    )


def _weight(parameter: nn.Parameter, whole: bool, unit: int) -> Weight:
    rows = parameter.shape[0] if parameter.dim() else 1
    return Weight(rows, parameter.numel() // max(1, rows), parameter.requires_grad, whole, unit)


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
    half = plan.dtype == "bf16" and not plan.lora_rank
    gradient = 0 if plan.optimizer_in_backward else 2 if half else 4
    return Trained(gradient, MOMENT_BYTES[plan.optimizer], 4 if half else 0)


def zero_stage(role: Role, plan: PlanConfig) -> int:
    """The ZeRO stage of a role; of a frozen model only the weights can be split."""
    if not role.frozen:
        return plan.zero
    return (3 if plan.zero == 3 else 0) if plan.frozen_zero is None else plan.frozen_zero


def static_bytes(role: Role, plan: PlanConfig, rank: int = 0) -> StaticBytes:
    """Bytes of a role in process `rank`; they lie on the GPU or, where they are offloaded, in CPU memory."""
    zero, each = zero_stage(role, plan), bytes_per_trained(plan)
    if plan.zero or zero:
        return StaticBytes(
            _share(role.weight_bytes, plan.gpus if zero >= 3 else 1),
            _share(role.trained * each.gradient, plan.gpus if zero >= 2 else 1),
            _share(role.trained * each.optimizer, plan.gpus if zero >= 1 else 1),
        )
    parts = spread_of(plan).parts
    number = rank % parts
    kept = sum(weight.part(parts, number)[1] * role.itemsize(weight) for weight in role.weights)
    trained = [weight.part(parts, number) for weight in role.trained_weights]
    return StaticBytes(
        kept,
        round(sum(kept for _, kept in trained) * each.gradient),
        round(sum(own for own, _ in trained) * each.optimizer),
    )


def master_bytes(role: Role, plan: PlanConfig, rank: int = 0) -> int:
    """Of the optimizer's bytes in process `rank`, those that are there before the first step."""
    each, optimizer = bytes_per_trained(plan), static_bytes(role, plan, rank).optimizer
    return round(optimizer * each.master / each.optimizer)


def widened_bytes(role: Role, plan: PlanConfig, rank: int) -> int:
    """What a step through fp32 copies takes beside the gradients at its peak, as `MasterWeights` takes it.

    The step widens one gradient after the other, the smallest first, and drops each. The gradients of a unit in shards
    lie in one storage, which is there as long as one of them is.
    """
    spread = spread_of(plan)
    waiting, dropped, most = dict[int, int](), 0, 0
    weights = sorted(role.trained_weights, key=lambda weight: weight.numel)
    together = [weight.unit if spread.parts > 1 and not weight.whole else -1 - i for i, weight in enumerate(weights)]
    for unit in together:
        waiting[unit] = waiting.get(unit, 0) + 1
    held = dict.fromkeys(waiting, 0)
    for weight, unit in zip(weights, together, strict=True):
        own, kept = weight.part(spread.parts, rank % spread.parts)
        most = max(most, 4 * own - dropped)
        held[unit] += 2 * kept
        waiting[unit] -= 1
        if not waiting[unit]:
            dropped += held[unit]
    return most


def _share(size: float, gpus: int) -> int:
    return -(-round(size) // gpus)
