"""A policy's log-probs and losses on sequences: from its hidden states, a chunk at a time, or from its logits.

Both ways give the same numbers. The way by hidden states never holds [B, T, V] and is the default. It needs a model
whose logits are the output embedding of the last hidden state, with or without a soft cap; `output_head` tries this out
on the model at hand.

A token drawn with top-k or top-p is trained on the set that it was drawn from (`kept`, of `sample_tokens`):
log p = z_t - log sum_{kept} e^z. The policy that drew, the policy in training and the reference all use this set, so
that equal models have ratio 1 and KL 0. Each position has a set of its own, so such tokens go by the logits.

Shapes: B rows, T response tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.lm import balance
from rlhf_fast.lm.dtypes import HALVES
from rlhf_fast.lm.forward import call, one_pass, within
from rlhf_fast.lm.passes import response_hidden, response_logits
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.ops import (
    LinearDPOLoss,
    LinearKTOLoss,
    LinearLoss,
    LinearPPOLoss,
    TokenLogprobs,
    dpo_loss,
    kto_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_ppo_loss,
    linear_reinforce_loss,
    linear_sft_loss,
    linear_token_kl,
    linear_token_logprobs,
    ppo_loss,
    reinforce_loss,
    token_kl,
    token_logprobs,
)
from rlhf_fast.ops.truncation import unpacked

Loss = TypeVar("Loss", LinearLoss, LinearDPOLoss, LinearKTOLoss)


class OutputHead(NamedTuple):
    """The output embedding. A pass reads its weight, because a wrapper may replace the weight between passes."""

    layer: nn.Linear  # weight [V, H], bias [V] or None
    softcap: float | None


class Objectives:
    """The losses of one model.

    temperature: logits are divided by it, as in sampling. fused: losses are computed from hidden states where
        `output_head` finds a head, else from logits. balanced: `sft`, `dpo` and `kto` add the load-balancing loss of
        the experts where the model's config asks for it (`balance`).
    aux_loss: the load-balancing loss of the last such pass times the pass's part of its batch, 0-dim and detached,
        before its coefficient; None without one.
    Many methods take `kept`, the tokens that could be drawn: [B, T, ceil(V / 8)] uint8 (bits, as in `sample_tokens`),
    or None for all tokens.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float = 1.0, fused: bool = True, balanced: bool = False
    ) -> None:
        self.model, self.temperature = model, temperature
        self.head = output_head(model) if fused else None
        self.balanced, self.aux_loss = balanced and within(model, balance.balanced, model), None

    @one_pass
    def logprobs(
        self, sequences: Sequences, token_ids: Tensor | None = None, *, kept: Tensor | None = None
    ) -> TokenLogprobs:
        """Log-probability and entropy [B, T] of the response tokens, or of `token_ids` (-100 = masked)."""
        ids = _response_ids(sequences) if token_ids is None else token_ids
        if self.head is None or kept is not None:
            return token_logprobs(kept_logits(self.model, sequences, kept), ids, temperature=self.temperature)
        return linear_token_logprobs(*self._layer(sequences), ids, **self._options())

    @one_pass
    def sft(self, sequences: Sequences, token_ids: Tensor, normalizer: float) -> LinearLoss:
        """-sum of log p(token) / normalizer over the `token_ids` [B, T] that are not -100."""
        part = (token_ids != -100).sum() / normalizer
        return self._with_balance(part, self._sft, sequences, token_ids, normalizer)

    def _sft(self, sequences: Sequences, token_ids: Tensor, normalizer: float) -> LinearLoss:
        if self.head is None:
            out = self._trained_logprobs(sequences, token_ids)
            return LinearLoss(-out.logprobs.sum() / normalizer, out.logprobs.detach(), out.entropy.detach())
        return linear_sft_loss(*self._layer(sequences), token_ids, normalizer=normalizer, **self._options())

    @one_pass
    def reinforce(
        self, sequences: Sequences, advantages: Tensor, *, kept: Tensor | None = None, **options: Any
    ) -> LinearLoss:
        """`reinforce_loss` of the response tokens, with its options."""
        if self.head is None or kept is not None:
            out = self._trained_logprobs(sequences, _response_ids(sequences), kept)
            loss = reinforce_loss(out.logprobs, advantages, sequences.response_mask, **options)
            return LinearLoss(loss, out.logprobs.detach(), out.entropy.detach())
        ids, mask = sequences.response_ids, sequences.response_mask
        return linear_reinforce_loss(*self._layer(sequences), ids, advantages, mask, **options, **self._options())

    @one_pass
    def ppo(
        self,
        sequences: Sequences,
        old_logprobs: Tensor,
        advantages: Tensor,
        *,
        hidden: Tensor | None = None,
        kept: Tensor | None = None,
        **options: Any,
    ) -> LinearPPOLoss:
        """`ppo_loss` of the response tokens, with its options.

        hidden: the `response_hidden` of these sequences, where the caller has computed it for something else too. It is
            read only with a `head` and without `kept`.
        """
        if self.head is None or kept is not None:
            out = self._trained_logprobs(sequences, _response_ids(sequences), kept)
            loss = ppo_loss(
                out.logprobs, old_logprobs, advantages, sequences.response_mask, entropy=out.entropy, **options
            )
            return LinearPPOLoss(*loss, out.logprobs.detach(), out.entropy.detach())
        ids, mask = sequences.response_ids, sequences.response_mask
        hidden = response_hidden(self.model, sequences) if hidden is None else hidden
        return linear_ppo_loss(
            hidden, self.head.layer.weight, ids, old_logprobs, advantages, mask, **options, **self._options()
        )

    @one_pass
    def dpo(
        self,
        pairs: Sequences,
        ref_logps: tuple[Tensor | None, Tensor | None],
        normalizer: float,
        *,
        kept: Tensor | None = None,
        **options: Any,
    ) -> LinearDPOLoss:
        """`dpo_loss` of B pairs, with its options: the sum over pairs divided by normalizer.

        pairs: 2 B rows, first the B chosen answers, then the B rejected answers. ref_logps: [B] each, or None where
            the loss has no reference.
        """
        part = len(pairs.response_ids) / 2 / normalizer
        return self._with_balance(part, self._dpo, pairs, ref_logps, normalizer, kept, **options)

    def _dpo(
        self,
        pairs: Sequences,
        ref_logps: tuple[Tensor | None, Tensor | None],
        normalizer: float,
        kept: Tensor | None,
        **options: Any,
    ) -> LinearDPOLoss:
        ids = _response_ids(pairs)
        if self.head is None or kept is not None:
            chosen, rejected = self._trained_logprobs(pairs, ids, kept).logprobs.sum(dim=1).chunk(2)
            out = dpo_loss(chosen, rejected, *ref_logps, **options)
            loss = out.losses.sum() / normalizer
            return LinearDPOLoss(loss, out.losses.detach(), *out[1:], chosen.detach(), rejected.detach())
        return linear_dpo_loss(
            *self._layer(pairs), ids, *ref_logps, normalizer=normalizer, **options, **self._options()
        )

    @one_pass
    def kto(
        self,
        sequences: Sequences,
        ref_logps: Tensor,
        labels: Tensor,
        kl: Tensor | None,
        normalizer: float,
        **options: Any,
    ) -> LinearKTOLoss:
        """`kto_loss` of B completions, with its options: the sum over completions divided by normalizer.

        ref_logps: [B]. labels: [B] bool, True = good. kl: 0-dim in nats, or None where the loss uses none.
        """
        part = len(ref_logps) / normalizer
        return self._with_balance(part, self._kto, sequences, ref_logps, labels, kl, normalizer, **options)

    def _kto(
        self,
        sequences: Sequences,
        ref_logps: Tensor,
        labels: Tensor,
        kl: Tensor | None,
        normalizer: float,
        **options: Any,
    ) -> LinearKTOLoss:
        ids = _response_ids(sequences)
        if self.head is None:
            logps = self._trained_logprobs(sequences, ids).logprobs.sum(dim=1)
            out = kto_loss(logps, ref_logps, labels, kl, **options)
            return LinearKTOLoss(out.losses.sum() / normalizer, out.losses.detach(), out.rewards, logps.detach())
        return linear_kto_loss(
            *self._layer(sequences), ids, ref_logps, labels, kl, normalizer=normalizer, **options, **self._options()
        )

    @one_pass
    def kl(self, reference: "Objectives", sequences: Sequences) -> Tensor:
        """KL(policy || reference) [B, T] of the next-token distributions at the response tokens, 0 at masked places.

        The KL is exact over the vocabulary, in nats. `reference` is a constant.
        """
        return within(reference.model, self._kl, reference, sequences)

    def _kl(self, reference: "Objectives", sequences: Sequences) -> Tensor:
        ids, mine, theirs = _response_ids(sequences), self.head, reference.head
        if mine is None or theirs is None or mine.softcap != theirs.softcap:
            logits, ref_logits = (response_logits(o.model, sequences) for o in (self, reference))
            if logits.dtype != ref_logits.dtype:
                logits, ref_logits = logits.float(), ref_logits.float()
            return token_kl(logits, ref_logits, ids, temperature=self.temperature).kl
        own, other = self._layer(sequences), reference._layer(sequences)
        return linear_token_kl(*own, *other, ids, ref_bias=theirs.layer.bias, **self._options()).kl

    def _with_balance(self, part: Tensor | float, loss: Callable[..., Loss], *args: Any, **options: Any) -> Loss:
        """`loss(*args, **options)` with the load-balancing loss of its passes; part: of the batch, in these passes."""
        self.aux_loss = None
        if not (self.balanced and torch.is_grad_enabled()):
            return loss(*args, **options)
        with balance.routed(self.model) as found:
            out = loss(*args, **options)
            aux = found.loss() * part
        self.aux_loss = aux.detach()
        return out._replace(loss=out.loss + balance.coefficient(self.model) * aux)

    def _trained_logprobs(self, sequences: Sequences, token_ids: Tensor, kept: Tensor | None = None) -> TokenLogprobs:
        """Log-probs whose backward writes the gradient over the logits. Nothing else reads these logits."""
        logits_BTV = kept_logits(self.model, sequences, kept)
        return token_logprobs(logits_BTV, token_ids, temperature=self.temperature, inplace_backward=True)

    def _layer(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        assert self.head is not None  # callers go by the logits where there is no head
        return response_hidden(self.model, sequences), self.head.layer.weight

    def _options(self) -> dict[str, Any]:
        assert self.head is not None  # as in `_layer`
        return {"bias": self.head.layer.bias, "temperature": self.temperature, "softcap": self.head.softcap}


def kept_logits(model: PreTrainedModel, sequences: Sequences, kept: Tensor | None) -> Tensor:
    """`response_logits` [B, T, V], -inf outside the `kept` tokens; None keeps all tokens."""
    logits_BTV = response_logits(model, sequences)
    if kept is not None:
        with torch.no_grad():  # autograd need not know of the fill: the gradient of a logit at -inf is 0 anyway
            logits_BTV.masked_fill_(~unpacked(kept, logits_BTV.shape[-1]), -math.inf)
    return logits_BTV


@torch.no_grad()
@one_pass
def output_head(model: PreTrainedModel) -> OutputHead | None:
    """The layer whose product with the last hidden state is the model's logits; None where there is no such layer.

    Some architectures also scale the hidden state or the logits (Cohere, Granite, MPT). The product is therefore
    compared with the model's own logits on two tokens.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or model.base_model is model:
        return None
    config = model.config.get_text_config()
    head = OutputHead(layer, getattr(config, "final_logit_softcapping", None))
    ids = torch.tensor([[1, 2]], device=layer.weight.device) % layer.weight.shape[0]
    training = model.training
    model.eval()
    logits = call(model, input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    model.train(training)
    if hidden.shape[-1] != layer.in_features:
        return None
    with torch.autocast(hidden.device.type, enabled=False):  # a mixed model has wider hidden states than weights
        wide = torch.promote_types(hidden.dtype, layer.weight.dtype)
        bias = None if layer.bias is None else layer.bias.to(wide)
        mine = F.linear(hidden.to(wide), layer.weight.to(wide), bias).float()
    if head.softcap is not None:
        mine = head.softcap * torch.tanh(mine / head.softcap)
    tolerance = 2e-2 if logits.dtype in HALVES else 1e-3
    return head if torch.allclose(mine, logits.float(), rtol=tolerance, atol=tolerance) else None


def _response_ids(sequences: Sequences) -> Tensor:
    return sequences.response_ids.masked_fill(~sequences.response_mask, -100)
