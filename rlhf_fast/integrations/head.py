"""The last layer of a language model as trainers of other libraries ask for it: fields per token, one loss.

Log-probs and entropies come from `linear_token_logprobs`, which never holds [N, V]. TRL's metrics read three more
facts of a token's distribution. They are taken without gradients, and mostly without the logits:

- the mean logit is the product of the hidden state with the mean row of the weight
- whether a token is the most likely one follows from its log-prob and the entropy H. It is where p > 1/2. It is not
  where p < e^-H, because the largest probability is at least e^-H. The logits of the other tokens are computed.
- log(sum of p^2) needs all logits, a block of tokens at a time

Shapes: N tokens in any leading shape, n of them counted; H hidden, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops import linear_sft_loss, linear_token_logprobs
from rlhf_fast.ops.reference import IGNORED_ID, no_autocast

MARGIN = 1e-3
"""In nats: a token this near to a bound of its log-prob has its logits computed."""
BLOCK_BYTES = 64 << 20
"""The size of a block of logits, for the facts that need logits."""


class Distribution(NamedTuple):
    """What becomes of the product with the weight: z = softcap * tanh(scale * (h W^T + b) / softcap) / temperature.

    in_fp32: the product is one of float32 under autocast too.
    """

    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0
    in_fp32: bool = False


class Layer(NamedTuple):
    """weight [V, H] and bias [V] or None, with the distribution behind them."""

    weight: Tensor
    bias: Tensor | None
    distribution: Distribution

    def scaled(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias whose product is scale * (h W^T + b), in the dtype of autocast on a GPU."""
        weight, bias, scale = self.weight, self.bias, self.distribution.scale
        if self.distribution.in_fp32:
            hidden, weight = hidden.float(), weight.float()
        elif hidden.is_cuda and torch.is_autocast_enabled("cuda"):  # as the model's own head would run
            dtype = torch.get_autocast_dtype("cuda")
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if scale != 1.0:
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        return hidden, weight, bias

    def options(self) -> dict[str, Any]:
        """The options of a fused head."""
        return {"temperature": self.distribution.temperature, "softcap": self.distribution.softcap}


def token_fields(
    layer: Layer, hidden: Tensor, token_ids: Tensor, names: tuple[str, ...], *, summed: bool = False
) -> dict[str, Tensor]:
    """The fields of TRL's `FusedCausalLMOutput` of these names, each [N] and 0 where token_ids is -100.

    hidden: [N, H]. token_ids: [N] int64. names: among log_probs and entropy, which are differentiable, and
    mean_logits, is_top1 and log_sum_sq_probs, which are not. margin, the token's logit less the mean logit, is
    differentiable and known without a soft cap. summed: the loss is a multiple of the sum of the
    log-probs. Its gradient is then taken while the logits are there, which saves one of four products with the weight.
    Another loss stays right, and costs two products more.
    """
    hidden, weight, bias = layer.scaled(hidden)
    options = layer.options()
    wants = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if summed and wants:
        logprobs, entropy = _Summed.apply(hidden, weight, bias, token_ids, options)
    else:
        logprobs, entropy = linear_token_logprobs(hidden, weight, token_ids, bias=bias, **options)
    fields = {"log_probs": logprobs, "entropy": entropy}
    if "margin" in names:
        fields["margin"] = _margin(hidden, weight, bias, token_ids, layer.distribution)
    if not fields.keys() >= set(names):
        with torch.no_grad(), no_autocast(hidden):
            facts = _Facts(hidden, weight, bias, token_ids, layer.distribution)
            if "is_top1" in names:
                fields["is_top1"] = facts.is_top1(logprobs, entropy)
            if "mean_logits" in names:
                fields["mean_logits"] = facts.mean_logits()
            if "log_sum_sq_probs" in names:
                fields["log_sum_sq_probs"] = facts.log_sum_sq_probs()
    return {name: fields[name] for name in ("log_probs", *names)}


def _margin(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, distribution: Distribution
) -> Tensor:
    """The token's logit less the mean logit: a product with the weight's row less the mean row."""
    if distribution.softcap is not None:
        raise ValueError(f"softcap: expected None where margins are asked for, got {distribution.softcap}")
    counted = (token_ids != IGNORED_ID).nonzero().squeeze(1)
    ids, states = token_ids[counted], hidden[counted]
    with no_autocast(hidden):
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        rows = F.embedding(ids, weight).to(dtype) - weight.mean(0, dtype=dtype)
        margin = (states.to(dtype) * rows).sum(1)
        if bias is not None:
            margin = margin + bias[ids].to(dtype) - bias.mean(dtype=dtype)
    return margin.new_zeros(len(token_ids)).index_copy(0, counted, margin / distribution.temperature)


class _Summed(torch.autograd.Function):
    """Log-probs and entropies; the gradient of the log-probs' sum is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        inputs = hidden, weight, bias
        leaves: list[Any] = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad():
            out = linear_sft_loss(leaves[0], leaves[1], token_ids, bias=leaves[2], normalizer=1.0, **options)
        ctx.loss, ctx.leaves, ctx.ids, ctx.options = out.loss, leaves, token_ids, options
        ctx.set_materialize_grads(False)
        return out.logprobs, out.entropy

    @staticmethod
    def backward(ctx: Any, by_logprobs: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.leaves
        wanted = [x for x in ctx.leaves if x is not None and x.requires_grad]
        counted = None if by_logprobs is None else by_logprobs[ctx.ids != IGNORED_ID]
        if by_entropy is None and counted is not None and (not len(counted) or bool((counted == counted[0]).all())):
            upstream = -counted[0] if len(counted) else counted.sum()
            found = iter(torch.autograd.grad(ctx.loss, wanted, upstream.to(ctx.loss.dtype)))
        else:
            with torch.enable_grad():
                outs = linear_token_logprobs(hidden, weight, ctx.ids, bias=bias, **ctx.options)
            pairs = [(out, by) for out, by in zip(outs, (by_logprobs, by_entropy), strict=True) if by is not None]
            found = iter(torch.autograd.grad([out for out, _ in pairs], wanted, [by for _, by in pairs]))
        ctx.loss = ctx.leaves = None
        gradients = [next(found) if x is not None and x.requires_grad else None for x in (hidden, weight, bias)]
        return *gradients, None, None


class _Facts:
    """Facts of the counted tokens' distributions, without gradients."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, distribution: Distribution
    ) -> None:
        self.counted = (token_ids != IGNORED_ID).nonzero().squeeze(1)
        self.hidden, self.ids, self.number = hidden, token_ids, len(token_ids)
        self.dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        self.weight, self.bias, self.distribution = weight, bias, distribution

    def mean_logits(self) -> Tensor:
        """The mean of z over the vocabulary."""
        if self.distribution.softcap is not None:
            return self._fill(self.counted, [z.mean(1) for _, z in self._logits(self.counted)])
        row_H = self.weight.mean(0, dtype=self.dtype)
        shift = 0.0 if self.bias is None else self.bias.mean(dtype=self.dtype)
        means = (self.hidden[self.counted].to(self.dtype) @ row_H + shift) / self.distribution.temperature
        return self._fill(self.counted, [means])

    def is_top1(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Whether the token is the most likely one; the first of equals is."""
        logprobs, entropy = logprobs[self.counted], entropy[self.counted]
        surely = logprobs > math.log(0.5) + MARGIN
        rows = self.counted[~surely & (logprobs >= -entropy - MARGIN)]
        top = self._fill(self.counted, [surely])
        found = [z.argmax(1) == self.ids[part] for part, z in self._logits(rows)]
        return top.index_copy(0, rows, torch.cat(found)) if found else top

    def log_sum_sq_probs(self) -> Tensor:
        """log(sum of p^2) over the vocabulary."""
        parts = (z for _, z in self._logits(self.counted))
        return self._fill(self.counted, [(2 * z).logsumexp(1) - 2 * z.logsumexp(1) for z in parts])

    def _fill(self, rows: Tensor, parts: list[Tensor]) -> Tensor:
        """[N] that has these values at `rows`, and 0 elsewhere."""
        values = torch.cat(parts) if parts else self.hidden.new_zeros(0, dtype=self.dtype)
        return values.new_zeros(self.number).index_copy(0, rows, values)

    def _logits(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows [C], z [C, V]) of a block of tokens after the other."""
        V = self.weight.shape[0]
        for part in rows.split(max(1, BLOCK_BYTES // (V * self.dtype.itemsize))) if len(rows) else ():
            z = self.hidden[part].to(self.dtype) @ self.weight.t().to(self.dtype)
            if self.bias is not None:
                z += self.bias
            softcap = self.distribution.softcap
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            yield part, z / self.distribution.temperature
