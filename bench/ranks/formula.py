"""The collectives and bytes of an optimizer step, or of a round of an online stage, as the documents promise them.

A trained model in shards: every unit (a decoder layer, or the rest of the model) is gathered for the forward pass, the
layers again for the backward pass, and the gradients of every unit are reduce-scattered once. That is 3 times the
weights for each micro-batch at most. A model that only reads in this moment is gathered once. Without shards the
gradients are added up once for each optimizer step, with a number for each parameter.
"""

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from bench.ranks.traffic import NUMBERS
from rlhf_fast.lm.precision import HALVES, decoder_layers
from rlhf_fast.methods import METHODS, STAGES

Kinds = dict[str, dict[str, int]]  # kind -> {"count", "bytes"}
GATHER, SCATTER, ADD = "all-gather", "reduce-scatter", "all-reduce"
_BUCKET = 1 << 24  # as in rlhf_fast.ranks


class Sizes(NamedTuple):
    """A model as it is sent. Numbers count the rows that are added so that all processes have equally many."""

    layers: int
    layer_numbers: int  # of all layers
    root_numbers: int
    weight_bytes: int  # of a number
    gradient_bytes: int
    trained: int  # numbers of the trained parameters, without such rows
    parameters: int  # trained

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return (self.layer_numbers + self.root_numbers) * self.weight_bytes


def sizes_of(model: PreTrainedModel, processes: int) -> Sizes:
    """The sizes of a model whose weights all are trained, or all frozen."""
    layers = list(dict.fromkeys(decoder_layers(model)))
    inside = list({p: None for layer in layers for p in layer.parameters()})
    outside = [p for p in model.parameters() if not any(p is other for other in inside)]
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = next(model.parameters()).dtype

    def padded(parameters: list[nn.Parameter]) -> int:
        return sum(p.numel() // max(p.shape[0], 1) * -(-p.shape[0] // processes) * processes for p in parameters)

    return Sizes(
        len(layers),
        padded(inside),
        padded(outside),
        dtype.itemsize,
        4 if dtype in HALVES else dtype.itemsize,
        sum(p.numel() for p in trained),
        len(trained),
    )


class Work(NamedTuple):
    """What a step does. updates: optimizer steps of a round. micro_batches: of the process with the most of them."""

    stage: str
    updates: int = 1
    micro_batches: int = 1


def collectives(work: Work, sizes: dict[str, Sizes], shards: bool) -> Kinds:
    """kind -> count and bytes of a step (offline stages) or a round (online stages).

    sizes: of every model by its role; the first is the stage's product, `value` is PPO's value model, `reference` is
    the frozen reference, and every other model scores. Exchanges of numbers have a count alone.
    """
    online = work.stage in METHODS and STAGES[work.stage].rows == "prompt"
    product = next(iter(sizes))
    trained = [product, *(["value"] if work.stage == "ppo" else [])]
    found = Kinds()
    if shards:
        for role in reads(work.stage, sizes) if online else [product] if work.stage == "kto" else []:
            _add(found, GATHER, sizes[role].layers + 1, sizes[role].weights)
        for role in trained:
            passes, size = work.updates * work.micro_batches, sizes[role]
            gathered = (2 * size.layer_numbers + size.root_numbers) * size.weight_bytes
            gradients = (size.layer_numbers + size.root_numbers) * size.gradient_bytes
            _add(found, GATHER, passes * (2 * size.layers + 1), passes * gathered)
            _add(found, SCATTER, passes * (size.layers + 1), passes * gradients)
            _add(found, ADD, work.updates, work.updates * size.parameters * size.gradient_bytes)  # for the norm
    else:
        for role in trained:
            size = sizes[role]
            added = (size.trained + size.parameters) * size.gradient_bytes
            _add(found, ADD, work.updates * max(1, -(-size.trained // _BUCKET)), work.updates * added)
    _add(found, NUMBERS, numbers(work, online), 0)
    return found


def reads(stage: str, sizes: dict[str, Sizes]) -> list[str]:
    """The models that an online stage makes whole in a round, with a name for each time."""
    product, *others = sizes
    scorers = [role for role in others if role not in ("value", "reference")]
    whole = [
        product,
        *scorers,
        *(scorers if stage == "remax" else []),
        "reference",
    ]  # greedy completions are scored too
    return [*whole, *(["value"] if stage == "ppo" else [])]


def numbers(work: Work, online: bool) -> int:
    """Exchanges of a handful of numbers: the metrics of each optimizer step, and what a stage needs before the step.

    A round tells its metrics and the lengths of its completions; PPO whitens over all advantages; online DPO counts
    its pairs; GRPO has the scores of all groups; KTO has the KL of mismatched completions.
    """
    before = {"ppo": 1, "grpo": 1, "online-dpo": 1, "kto": 1}.get(work.stage, 0)
    return work.updates + int(online) + before


def _add(found: Kinds, kind: str, count: int, size: int) -> None:
    counted = found.setdefault(kind, {"count": 0, "bytes": 0})
    counted["count"] += count
    counted["bytes"] += size


def summed(counts: dict[str, Kinds]) -> Kinds:
    """The collectives of all phases."""
    found = Kinds()
    for kinds in counts.values():
        for kind, counted in kinds.items():
            _add(found, kind, counted["count"], counted["bytes"])
    return found


def differences(found: Kinds, promised: Kinds, processes: int) -> list[str]:
    """What is not as promised, a line each. An exchange of numbers has at most 2 KiB of each process."""
    lines = []
    for kind in sorted({*found, *promised}):
        got, wanted = (kinds.get(kind, {"count": 0, "bytes": 0}) for kinds in (found, promised))
        if kind == NUMBERS:
            wanted = {**wanted, "bytes": min(got["bytes"], got["count"] * processes * 2048)}
        lines += [
            f"{kind}: {got[what]:,} {what}, expected {wanted[what]:,}" for what in got if got[what] != wanted[what]
        ]
    return lines


def as_sizes(record: dict[str, dict[str, Any]]) -> dict[str, Sizes]:
    """Sizes that went through JSON."""
    return {role: Sizes(**fields) for role, fields in record.items()}
