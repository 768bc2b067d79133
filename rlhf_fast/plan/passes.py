"""The bytes of one pass through a model beyond its weights: the stages' own code on fake tensors, counted.

A model of many equal layers is not run whole: every peak is an affine function of the number of layers and of the
number of rows (for each of the moments told apart below), so that two small numbers of each give all others exactly.
The moments are: the forward pass up to the end of the last layer's backward pass, where most activations are held; the
backward pass of the other layers, where gradients replace activations, by its two ends, between which no layer needs
more; what follows it, where all gradients are held; and the call of the fused loss, whose own buffers are
`ops.heads.working_bytes`.

A model in shards is in shards here too, by the run's own code: what its passes add holds the layers that are whole
while they run, the root's weights, and the buffers of FSDP2's messages.

Shapes: B rows, P prompt tokens, T response tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from rlhf_fast.lm.forward import within
from rlhf_fast.lm.objectives import kept_logits
from rlhf_fast.lm.packing import packs_prompts
from rlhf_fast.lm.passes import response_hidden, sequence_scores, token_values
from rlhf_fast.lm.private import cache_bytes, lengthen
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.sharding import whole
from rlhf_fast.ops.private import FakeTensorMode
from rlhf_fast.ops.truncation import kept_tokens, packed
from rlhf_fast.plan.shapes import Shape, layer_count, layers_of, make_fake, period
from rlhf_fast.plan.spread import Spread
from rlhf_fast.ranks import bytes_to_add
from rlhf_fast.rollout import blocks
from rlhf_fast.rollout.decoders import CacheDecoder, WholeDecoder, takes_cache
from rlhf_fast.rollout.engine import StaticDecoder
from rlhf_fast.training.learner import autocast
from rlhf_fast.training.tensor_bytes import TensorBytes


class Run(NamedTuple):
    """A pass of a model at a number of rows, which gives bytes at named moments. settings: what it was made with."""

    settings: tuple
    run: Callable[[PreTrainedModel, int], dict[str, int]]

    def __call__(self, model: PreTrainedModel, rows: int) -> dict[str, int]:
        return self.run(model, rows)


class Curve:
    """Bytes at named moments of `run` as a function of rows, on models of `shape` spread over processes.

    Models of few layers are simulated and extrapolated to all layers. The curve is exact at `rows` rows. Elsewhere it
    is a line through 8 times as many rows. Should another moment's bytes prevail at more rows, it is above the truth up
    to there.
    """

    def __init__(self, shape: Shape, run: Run, rows: int, spread: Spread) -> None:
        self.rows = (rows, 8 * rows)
        self._sample = partial(_simulate, shape, run, spread)
        self.low, self.high = self._sample(rows), None

    def __call__(self, rows: int) -> dict[str, int]:
        if rows == self.rows[0]:
            return {name: round(low) for name, low in self.low.items()}
        if self.high is None:  # many plans ask for one number of rows
            self.high = self._sample(self.rows[1])
        share = (rows - self.rows[0]) / (self.rows[1] - self.rows[0])
        return {name: round(low + share * (self.high[name] - low)) for name, low in self.low.items()}


def _simulate(shape: Shape, run: Run, spread: Spread, rows: int) -> dict[str, float]:
    layers, unit = layer_count(shape.config), period(shape.config)
    # In shards the second layer from behind must have a layer before it, whose weights FSDP2 then gathers already.
    few = 3 if spread.how != "none" and unit == 1 else 2
    numbers = (few * unit, (few + 1) * unit) if layers > (few + 1) * unit else (layers,)
    samples = []
    for number in numbers:
        model = shape.build(number)
        with spread.putter() as put, FakeTensorMode():
            make_fake(model)
            put(model)
            samples.append(run(model, rows))
    return _extrapolate(numbers, samples, layers)


def _extrapolate(numbers: tuple[int, ...], samples: list[dict[str, int]], layers: int) -> dict[str, float]:
    if len(numbers) == 1:
        return dict(samples[0])
    (first, second), (a, b) = numbers, samples
    share = (layers - first) / (second - first)
    return {name: a[name] + share * (b[name] - a[name]) for name in a}


class Lengths(NamedTuple):
    prompt: int
    response: int

    def sequences(self, rows: int) -> Sequences:
        ids = [torch.zeros(rows, n, dtype=torch.long) for n in self]
        masks = [torch.ones(rows, n, dtype=torch.bool) for n in self]
        return Sequences(ids[0], masks[0], ids[1], masks[1])


class _FusedLoss(torch.autograd.Function):
    """What a loss from hidden states leaves for backward: the gradients, made already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tensors = zip((hidden, weight, bias), ctx.needs_input_grad, strict=True)
        ctx.gradients = [torch.empty_like(x) if x is not None and wanted else None for x, wanted in tensors]
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)


class _LogitsLoss(torch.autograd.Function):
    """A loss from logits, whose gradient is written over them and gone with the matmul that takes it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return ctx.saved_tensors[0].detach()


class _Moments:
    """Peaks between marks, and the bytes held when the fused loss is called."""

    def __init__(self, counter: TensorBytes) -> None:
        self.counter = counter
        self.bytes: dict[str, int] = dict.fromkeys(
            ("activations", "second layer", "first layer", "gradients", "loss"), 0
        )

    def mark(self, name: str) -> None:
        self.bytes[name] = max(self.bytes[name], self.counter.take_peak())

    def end(self) -> None:
        """Fills in marks that no hook set: the backward pass never leaves a first layer whose input needs no gradient.

        In a model of two layers the first layer is also the second layer from behind.
        """
        for name in ("first layer", "gradients"):
            if not self.bytes[name]:
                self.mark(name)
        if not self.bytes["second layer"]:
            self.bytes["second layer"] = self.bytes["first layer"]

    def loss(self) -> None:
        self.bytes["loss"] = self.counter.live


def training(
    shape: Shape,
    lengths: Lengths,
    *,
    loss: str,
    fused: bool,
    truncated: bool = False,
    keep: bool,
    added: bool,
    repeats: int,
    critic: bool,
) -> Run:
    """Forward and backward: "activations" (to the end of the last layer's backward), "second layer" from behind, "first
    layer", "gradients" (behind it), and "loss" (held before the loss, where it is fused).

    loss: "tokens" (log-probs of the response), "values" or "scores". truncated: tokens drawn with top_k or top_p; the
    kept sets are left out. keep: gradients stay on the weights; else each is gone as soon as it is whole (optimizer
    step in backward, or split by ZeRO). added: a gradient that is not kept is first added up over processes. repeats: 2
    to meet the gradients of an earlier micro-batch. critic: a value head on the same trunk.
    """

    def run(model: PreTrainedModel, rows: int) -> dict[str, int]:
        value_head = (
            torch.nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=shape.dtype) if critic else None
        )
        kept = _kept_sets(model, rows, lengths) if truncated else None
        layers = layers_of(model)
        hooks = [_after_backward(layers[-1], lambda: moments.mark("activations"))]
        if len(layers) > 1:
            hooks.append(_after_backward(layers[0], lambda: moments.mark("first layer")))
        if len(layers) > 2:
            hooks.append(_after_backward(layers[-2], lambda: moments.mark("second layer")))
        if not keep:
            drop = _add_and_drop if added else _drop
            hooks += [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
        left_out = [*model.parameters(), *model.buffers(), *([kept] if truncated else [])]
        with TensorBytes(exclude=left_out) as counter:
            for _ in range(repeats):
                moments = _Moments(counter)
                with autocast(model.device, shape.autocast):
                    given = lengths.sequences(rows), loss, fused, kept, value_head, moments
                    outputs = within(model, _outputs, model, *given)
                torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
                del outputs
                moments.end()
        for hook in hooks:
            hook.remove()
        return moments.bytes

    return Run(("training", lengths, loss, fused, truncated, keep, added, repeats, critic), run)


def _kept_sets(model: PreTrainedModel, rows: int, lengths: Lengths) -> Tensor:
    return torch.empty(rows, lengths.response, set_bytes(model.config), dtype=torch.uint8)


def set_bytes(config: PreTrainedConfig) -> int:
    """Of the kept set of one token."""
    return -(-config.get_text_config().vocab_size // 8)


def _outputs(
    model: PreTrainedModel,
    sequences: Sequences,
    loss: str,
    fused: bool,
    kept: Tensor | None,
    value_head: Any,
    moments: _Moments,
) -> list[Tensor]:
    if loss == "values":
        return [token_values(model, sequences)]
    if loss == "scores":
        return [sequence_scores(model, sequences)]
    if not fused or model.base_model is model:  # as `output_head` decides
        return [_LogitsLoss.apply(kept_logits(model, sequences, kept))]
    hidden, layer = response_hidden(model, sequences), model.get_output_embeddings()
    assert isinstance(layer, torch.nn.Linear)  # a fused loss needs an output embedding
    values = [] if value_head is None else [value_head(hidden).squeeze(-1).float()]
    moments.loss()
    return [_FusedLoss.apply(hidden, layer.weight, layer.bias), *values]


def _after_backward(layer: torch.nn.Module, mark: Callable[[], None]) -> Any:
    """Calls `mark` when the backward pass leaves the layer."""

    def watch(layer: Any, inputs: tuple, *_: Any) -> None:
        if inputs[0].requires_grad and torch.is_grad_enabled():
            inputs[0].register_hook(lambda _: mark())

    return layer.register_forward_pre_hook(watch)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _add_and_drop(parameter: Tensor) -> None:
    assert parameter.grad is not None  # torch calls this hook when the gradient is there
    message = torch.empty(bytes_to_add([parameter.grad]), dtype=torch.uint8)
    del message
    parameter.grad = None


def inference(shape: Shape, lengths: Lengths) -> Run:
    """The trunk without gradients: "activations", "loss" (bytes held when the head is applied to the hidden states).

    Of a model in shards also "gather" (until it is whole) and "whole" (its whole weights, which the others include).
    """

    @torch.no_grad()
    def run(model: PreTrainedModel, rows: int) -> dict[str, int]:
        with (
            TensorBytes(exclude=[*model.parameters(), *model.buffers()]) as counter,
            autocast(model.device, shape.autocast),
            whole(model),
        ):
            gather, made_whole = counter.take_peak(), counter.live
            hidden = response_hidden(model, lengths.sequences(rows))
            held = counter.live
            del hidden
            activations = counter.take_peak()
        return {"gather": gather, "whole": made_whole, "activations": activations, "loss": held}

    return Run(("inference", lengths), run)


def rollout(shape: Shape, lengths: Lengths, rows_per_prompt: int, top_k: int, top_p: float) -> Run:
    """Prefill of the prompts and a decode step, rows = prompts: "prefill", "decode", "kv_cache", "casts".

    top_k, top_p: the decode step ends with the choice of the tokens that are kept.
    casts: weights in bfloat16 that autocast keeps until the end of its context, which holds scoring and reference too.
    Of a model in shards also "gather" and "whole", as `inference` has them.
    """

    @torch.no_grad()
    def run(model: PreTrainedModel, prompts: int) -> dict[str, int]:
        model.eval()
        with (
            TensorBytes(exclude=[*model.parameters(), *model.buffers()]) as counter,
            autocast(model.device, shape.autocast),
        ):
            with whole(model):
                gather, made_whole = counter.take_peak(), counter.live
                ids, mask, _, _ = lengths.sequences(prompts)
                parts = blocks.read(model, torch.bfloat16 if shape.autocast else None)
                if parts is not None:
                    backbone: Any = model.base_model
                    steps = StaticDecoder(model, parts, lengths.response, packs=packs_prompts(backbone))
                else:
                    steps = CacheDecoder(model) if takes_cache(model) else WholeDecoder(model)
                steps.prefill(ids, mask, rows_per_prompt)
                prefill = counter.take_peak()
                kv_cache = _full_cache(steps, sum(lengths))
                counter.take_peak()
                logits = steps.step(ids.new_zeros(prompts * rows_per_prompt))
                if top_k or top_p < 1:
                    _truncate(logits, top_k, top_p)
                decode = counter.take_peak()
                del ids, mask, parts, steps, logits
            casts = counter.live
        moments = {"prefill": prefill, "decode": decode, "kv_cache": kv_cache, "casts": casts}
        return moments | {"gather": gather, "whole": made_whole}

    return Run(("rollout", lengths, rows_per_prompt, top_k, top_p), run)


def _truncate(logits: Tensor, top_k: int, top_p: float) -> None:
    """What `sample_tokens` does beside reading logits, with all of them in order if top_p is looked for among all."""
    kept = kept_tokens(logits, 1.0, top_k, top_p)
    drawn_from = torch.where(kept, logits, -math.inf)
    del drawn_from
    packed(kept)


def _full_cache(steps: StaticDecoder | CacheDecoder | WholeDecoder, length: int) -> int:
    """Bytes of the cache once it holds `length` tokens a row; a cache that grows is left with all but the last."""
    if isinstance(steps, StaticDecoder):
        return steps.cache.nbytes
    if isinstance(steps, WholeDecoder):
        steps.ids = steps.ids.new_zeros(len(steps.ids), length - 1)
        return 0
    cache, rows = steps.cache, len(steps.mask)
    assert cache is not None  # `prefill` has run
    lengthen(cache, rows, length)
    held = cache_bytes(cache)
    lengthen(cache, rows, length - 1)
    steps.mask = steps.mask.new_ones(rows, length - 1)
    return held
