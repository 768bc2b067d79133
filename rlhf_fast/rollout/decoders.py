"""Decoders that run transformers' forward: with its cache, over whole rows, and apart for prompts of each length.

`CacheDecoder` takes any model whose forward hands out a cache of transformers, recurrent states included.
`WholeDecoder` needs no cache and runs whole rows at every step. `ByLength` runs another decoder for each group of
prompts that may share a pass. `engine` picks the first decoder that gives the model's own logits.

Shapes: B prompts of P tokens, R rows, n rows still decoding, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf_fast.lm.passes import forward_inputs, forward_parameters
from rlhf_fast.lm.private import choose_rows
from rlhf_fast.lm.sequences import position_ids
from rlhf_fast.ops.private import is_fake


class Decoder(Protocol):
    """One generation: `prefill` once, then `step` for every token, with `keep` between steps."""

    def prefill(self, ids: Tensor, mask: Tensor, copies: int) -> Tensor:
        """Logits [B * copies, V] behind left-padded prompts [B, P]; each prompt has `copies` consecutive rows."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] behind one more token [n] int64 of each row."""
        ...

    def keep(self, rows: Tensor) -> Tensor:
        """Drops all rows but `rows` ([m] of n, ascending); returns the order [m] in which these rows go on."""
        ...


class CacheDecoder:
    """transformers' forward with the cache that the model makes: a DynamicCache, or a class of its own (MiniMax).

    padded: whether prompts have padding. Without any, the model gets no mask: Mamba takes none beside its state.
    """

    def __init__(self, model: PreTrainedModel, *, padded: bool = True) -> None:
        self.model, self.padded = model, padded
        self.cache: Cache | None = None

    def prefill(self, ids: Tensor, mask: Tensor, copies: int) -> Tensor:
        """As in `Decoder`; the cache is expanded to `copies` rows per prompt."""
        positions = position_ids(mask)
        logits = self._logits(ids, mask, positions)
        assert self.cache is not None
        if copies > 1:
            choose_rows(self.cache, torch.arange(len(ids), device=ids.device).repeat_interleave(copies))
        self.mask = mask.repeat_interleave(copies, dim=0)
        self.position = positions[:, -1:].repeat_interleave(copies, dim=0)
        return logits.repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """As in `Decoder`."""
        self.mask = F.pad(self.mask, (0, 1), value=True)
        self.position = self.position + 1
        return self._logits(tokens[:, None], self.mask, self.position)

    def keep(self, rows: Tensor) -> Tensor:
        """As in `Decoder`; the rows keep their order."""
        assert self.cache is not None  # `prefill` has run
        choose_rows(self.cache, rows)
        self.mask, self.position = self.mask[rows], self.position[rows]
        return rows

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        logits, self.cache = last_logits(self.model, ids, mask if self.padded else None, positions, self.cache)
        return logits


class WholeDecoder:
    """transformers' forward over whole rows without padding, for models with no cache that this package knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, ids: Tensor, mask: Tensor, copies: int) -> Tensor:
        """As in `Decoder`, for prompts of one length, which need no mask."""
        if not is_fake(mask) and not mask.all():
            raise ValueError("mask: expected prompts of one length, got padding")
        self.ids = ids.repeat_interleave(copies, dim=0)
        return self._logits(ids).repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """As in `Decoder`."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        return self._logits(self.ids)

    def keep(self, rows: Tensor) -> Tensor:
        """As in `Decoder`; the rows keep their order."""
        self.ids = self.ids[rows]
        return rows

    def _logits(self, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids, dtype=torch.bool)
        return last_logits(self.model, ids, mask, position_ids(mask), None, cached=False)[0]


class ByLength:
    """A decoder of its own for the prompts of each length.

    make: makes a decoder. limit: prompts of up to this many tokens share one decoder, and so do longer prompts; None
        shares a decoder among prompts of one length alone.
    """

    def __init__(self, make: Callable[[], Decoder], limit: int | None = None) -> None:
        self.make, self.limit = make, limit

    def prefill(self, ids: Tensor, mask: Tensor, copies: int) -> Tensor:
        """As in `Decoder`."""
        lengths = mask.sum(dim=1)
        groups = lengths if self.limit is None else (lengths > self.limit).long()
        self.parts: list[tuple[Decoder, Tensor]] = []  # with the rows [m] of the batch that each decodes
        logits, copy = [], torch.arange(copies, device=ids.device)
        for group in groups.unique().tolist():
            prompts = (groups == group).nonzero().squeeze(1)
            width, decoder = int(lengths[prompts].max()), self.make()
            logits.append(decoder.prefill(ids[prompts, -width:], mask[prompts, -width:], copies))
            self.parts.append((decoder, (prompts[:, None] * copies + copy).flatten()))
        return self._in_order(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """As in `Decoder`."""
        return self._in_order([decoder.step(tokens[rows]) for decoder, rows in self.parts])

    def keep(self, rows: Tensor) -> Tensor:
        """As in `Decoder`; the rows keep their order."""
        before, self.parts = self.parts, []
        for decoder, mine in before:
            stays = torch.isin(mine, rows).nonzero().squeeze(1)
            if len(stays):
                order = stays if len(stays) == len(mine) else decoder.keep(stays)
                self.parts.append((decoder, torch.searchsorted(rows, mine[order])))
        return rows

    def _in_order(self, logits: list[Tensor]) -> Tensor:
        rows = torch.cat([rows for _, rows in self.parts])
        return torch.cat(logits).index_select(0, rows.argsort())


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes a cache by a name that this package knows."""
    return not forward_parameters(model).isdisjoint(("past_key_values", "cache_params"))


def last_logits(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    cache: Cache | None,
    *,
    cached: bool = True,
) -> tuple[Tensor, Cache | None]:
    """The model's own logits [n, V] behind the last column of ids [n, L], and its cache.

    cache: None where the model is to make the cache. cached: False runs without any.
    """
    takes, options = forward_parameters(model), {}
    name = "cache_params" if "cache_params" in takes else "past_key_values"
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = 1
    if cached and not takes_cache(model):
        raise TypeError(f"{type(model).__name__}.forward takes no cache")
    if cache is not None:
        options[name] = cache
    inputs: dict[str, Any] = forward_inputs(model, ids, ids if mask is None else mask, positions) | options
    if mask is None:
        del inputs["attention_mask"]
    out = model(**inputs, use_cache=cached)
    return out.logits[:, -1], getattr(out, name) if cached else None
