"""Decoders: a prompt goes in once, then one token per row and step; rows can be dropped between steps.

`StaticDecoder` runs `blocks` over a preallocated cache. Every index is a tensor, so that a CUDA device can replay the
step as a graph. The decoders of `decoders` call transformers' forward; they are slower, and take any model. `decoder`
picks the first decoder that gives the model's own logits.

Shapes: B prompts of P tokens, R rows, n rows still decoding, S cache slots, L layers, D head size, K key/value heads,
G query heads per key/value head, V vocabulary.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf_fast.lm.causal import check_decoder
from rlhf_fast.lm.dtypes import as_it_runs
from rlhf_fast.lm.fast_paths import not_taken
from rlhf_fast.lm.packing import packs_prompts, prompt_states
from rlhf_fast.lm.passes import forward_inputs
from rlhf_fast.lm.private import keys_and_values
from rlhf_fast.lm.sequences import position_ids
from rlhf_fast.lm.switches import difference, switching_length, trial_rows, vocabulary
from rlhf_fast.rollout import blocks, cpu
from rlhf_fast.rollout.decoders import ByLength, CacheDecoder, Decoder, WholeDecoder

# Attention reads the cache in pieces of this many slots; on CUDA a graph is captured for each number of pieces.
_SLOTS = 64
# `StaticDecoder` by its names in `_choice`.
_STATIC = ("static, packed prompts", "static")
# Model -> the decoder that gave the model's own logits in a trial, by its name in `_choice`.
_chosen: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()


def decoder(model: PreTrainedModel, new_tokens: int) -> Decoder:
    """A decoder with room for `new_tokens` tokens behind the prompt. The model must be in eval mode.

    Warns once where a model has to take another decoder than `StaticDecoder`.
    """
    dtype = _autocast_dtype(model)
    if model not in _chosen:
        _chosen[model] = _choice(model)
    choice, limit = _chosen[model], switching_length(model.config)

    def make() -> Decoder:
        parts = blocks.read(model, dtype) if choice in _STATIC else None
        if parts is not None:
            return StaticDecoder(model, parts, new_tokens, packs=choice == "static, packed prompts")
        return WholeDecoder(model) if choice == "whole" else CacheDecoder(model, padded=choice == "cache")

    if choice in (*_STATIC, "cache"):
        return make() if limit is None else ByLength(make, limit)
    return ByLength(make)


def _autocast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    return torch.get_autocast_dtype(model.device.type) if torch.is_autocast_enabled(model.device.type) else None


class StaticDecoder:
    """Our own step over a cache [L, R, 2 K, S, D] that is allocated once: keys first, then values.

    packs: whether prompts run side by side, without their padding; the model must be one that `packs_prompts`.
    """

    def __init__(self, model: PreTrainedModel, parts: blocks.Blocks, new_tokens: int, *, packs: bool = False) -> None:
        self.model, self.parts, self.new_tokens, self.packs = model, parts, new_tokens, packs

    def prefill(self, ids: Tensor, mask: Tensor, copies: int) -> Tensor:
        """As in `Decoder`, by a packed pass or by transformers' forward; its keys and values go into our cache."""
        (B, P), device, parts = ids.shape, ids.device, self.parts
        positions = position_ids(mask)
        cache = DynamicCache()  # keeps every key, because our masks have the sliding windows
        slots_N = None
        if self.packs:
            backbone: Any = self.model.base_model
            states_BH, slots_N = prompt_states(backbone, ids, mask, cache)
            logits = parts.head(states_BH)
        else:
            inputs = forward_inputs(self.model, ids, mask, positions)
            logits = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

        self.rows, self.length, S = B * copies, P, P + self.new_tokens
        layers = keys_and_values(cache)
        first = layers[0][0]
        shape = (len(parts.blocks), self.rows, 2 * parts.key_value_heads, S, parts.head_dim)
        self.cache = first.new_zeros(shape)  # uninitialised slots could hold NaN, and a mask does not hide NaN
        for layer, mine in zip(layers, self.cache, strict=True):
            both, places = torch.cat(layer, dim=1), mine.view(B, copies, *shape[2:])
            if slots_N is None:
                places[:, :, :, :P] = both[:, None]
            else:
                places[slots_N // P, :, :, slots_N % P] = both[0].transpose(0, 1)[:, None]
        self.starts = (~mask).sum(dim=1).repeat_interleave(copies)
        self.slot = torch.full((1,), P, device=device)
        self.position = (positions[:, -1] + 1).repeat_interleave(copies)
        self.tables = parts.rope(torch.arange(S, device=device)) if parts.rope else None
        if self.tables:
            cos, sin = (table.float() for table in self.tables)  # the compiled step reads fp32
            half = parts.head_dim // 2
            self.tables = cos.contiguous(), torch.cat([-sin[:, :half], sin[:, half:]], dim=1)  # see _rotate
        self.masks = {window: self._mask(mask, copies, S, window) for window in {b.window for b in parts.blocks}}
        self._readable = 0
        return logits.repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """As in `Decoder`, by `blocks`; on CUDA as a graph."""
        if self.length >= self._readable:
            self._look(self.length + 1)
        self.length += 1  # slots in use, this token's included
        return self._step(tokens) if self._graph is None else self._graph(self._step, tokens)

    def keep(self, rows: Tensor) -> Tensor:
        """As in `Decoder`. The last rows move to the places of the dropped rows, so that few rows move."""
        n = len(rows)
        stays = rows[rows < n]
        moved = rows[rows >= n]
        holes = torch.ones(n, dtype=torch.bool, device=rows.device).index_fill_(0, stays, False).nonzero().squeeze(1)
        order = torch.arange(n, device=rows.device).index_copy_(0, holes, moved)
        if len(holes):
            self.cache[:, holes, :, : self.length] = self.cache[:, moved, :, : self.length]
        self.position, self.starts = self.position[order], self.starts[order]
        self.masks = {window: mask[order] for window, mask in self.masks.items()}
        self.rows = n
        self._look(self._readable)
        return order

    def _mask(self, mask: Tensor, copies: int, S: int, window: int | None) -> Tensor:
        """What is added to scores, [R, 1, 1, window + S]: 0 where the next token may look, -inf elsewhere.

        A sliding window has `window` further columns in front, so that the column that leaves the window always exists.
        """
        B, P = mask.shape
        pad = window or 0
        visible = F.pad(mask, (pad, S - P))
        if window:
            visible[:, : P + 1] = False  # the token in slot P sees the slots from P - window + 1 on
        visible = visible.repeat_interleave(copies, dim=0)
        return torch.zeros(visible.shape, dtype=self.cache.dtype, device=mask.device).masked_fill_(
            ~visible, -torch.inf
        )[:, None, None]

    def _look(self, slots: int) -> None:
        """Makes the views that steps use until they need the cache's next piece or until rows are dropped."""
        prompt = self.cache.shape[3] - self.new_tokens
        pieces = -(-(slots - prompt) // _SLOTS)
        self._readable = S = min(self.cache.shape[3], prompt + max(1, pieces) * _SLOTS)
        K = self.parts.key_value_heads
        mine = self.cache[:, : self.rows]
        self._keys = [layer[:, :K, :S] for layer in mine]
        self._values = [layer[:, K:, :S] for layer in mine]
        self._seen = {window: mask[..., window or 0 :][..., :S] for window, mask in self.masks.items()}
        self._compiled = None
        tables = self.tables or ()
        if cpu.runs(self.cache) and all(cpu.runs(table) and table.dtype is torch.float32 for table in tables):
            state = self.tables, self.position, self.starts
            layers = zip(self.parts.blocks, mine, strict=True)
            self._compiled = [
                cpu.attention(layer, *state, scaling=block.scaling, softcap=block.softcap, window=block.window)
                for block, layer in layers
            ]
        self._graph = _Graph(self.rows, self.cache.device) if self.cache.is_cuda else None

    def _step(self, tokens: Tensor) -> Tensor:
        parts, n = self.parts, self.rows
        Q, K, D = parts.query_heads, parts.key_value_heads, parts.head_dim
        compiled = self._compiled
        attention = self._attention() if compiled is None else None
        x = parts.embed(tokens, self.position)
        for layer, block in enumerate(parts.blocks):
            heads = block.qkv(block.attention_norm(x)).view(n, Q + 2 * K, D)
            if block.q_norm is not None and block.k_norm is not None:
                q, k, v = heads.split([Q, K, K], dim=1)
                heads = torch.cat([block.q_norm(q), block.k_norm(k), v], dim=1)
            if compiled is not None:
                mixed = compiled[layer](heads.to(self.cache.dtype).contiguous(), self.length - 1)
            else:
                assert attention is not None
                mixed = attention(layer, block, heads)
            y = block.attention_out(mixed)
            x = x + (y if block.attention_post_norm is None else block.attention_post_norm(y))
            y = block.mlp(block.mlp_norm(x))
            x = x + (y if block.mlp_post_norm is None else block.mlp_post_norm(y))
        self.slot += 1
        self.position += 1
        return parts.head(parts.norm(x))

    def _attention(self) -> Callable[[int, blocks.Block, Tensor], Tensor]:
        """Attention of this step in plain PyTorch. Masks and rotary tables, which all layers share, are made first."""
        parts, n = self.parts, self.rows
        Q, K, D = parts.query_heads, parts.key_value_heads, parts.head_dim
        for window, mask in self.masks.items():
            mask.index_fill_(3, self.slot + (window or 0), 0.0)
            if window:
                mask.index_fill_(3, self.slot, -torch.inf)
        if self.tables:
            cos, sin = (table.index_select(0, self.position)[:, None] for table in self.tables)

        def attend(layer: int, block: blocks.Block, heads: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            qk, v = heads.split([Q + K, K], dim=1)
            q, k = (_rotate(qk, cos, sin) if self.tables else qk).to(keys.dtype).split([Q, K], dim=1)
            keys.index_copy_(2, self.slot, k[:, :, None])
            values.index_copy_(2, self.slot, v[:, :, None].to(keys.dtype))
            return _attend(q.reshape(n, K, Q // K, D), keys, values, self._seen[block.window], block).reshape(n, Q * D)

        return attend


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x [n, heads, D]; `sin` holds the sign of the rotated half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, block: blocks.Block) -> Tensor:
    """q [n, K, G, D] over [n, K, S, D]: the G query heads of a key/value head are passed as G queries of one head."""
    if block.softcap is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=block.scaling)
    scores = torch.tanh(q @ keys.transpose(2, 3) * (block.scaling / block.softcap)) * block.softcap
    return (scores + mask).softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values


class _Graph:
    """A step that is captured once and then replayed: one launch instead of a dozen per layer.

    The graph must not hold the step, because the step holds the decoder, and the cycle would keep the cache until
    Python looks for cycles.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.graph = None
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)

    def __call__(self, step: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        if self.graph is None:
            logits = step(self.tokens)  # sets up cuBLAS and makes these logits, because a capture runs nothing
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = step(self.tokens)
            return logits
        self.graph.replay()
        return self.logits


@torch.no_grad()
def _choice(model: PreTrainedModel) -> str:
    """The decoder that gives the model's own logits: one of `_STATIC`, "cache", "cache by length" or "whole"."""

    def static(packs: bool = False) -> Decoder:
        parts = blocks.read(model, _autocast_dtype(model))  # anew in every trial, because it reads the windows
        assert parts is not None
        return StaticDecoder(model, parts, _STEPS, packs=packs)

    with torch.autocast(model.device.type, enabled=False):
        try:
            known = blocks.read(model) is not None
            reason = _refusal(model, static, replaces=True) if known else "the layout of its layers is not known"
        except Exception as error:
            reason = f"a step over its weights raises {type(error).__name__}"
        if reason is None:
            backbone: Any = model.base_model
            if not packs_prompts(backbone):
                return "static"
            reason = _refusal(model, lambda: static(packs=True), replaces=True)
            if reason is None:
                return "static, packed prompts"
            not_taken("packed prompts are", model, reason, "transformers' forward runs over padded prompts")
            return "static"
        instead = "transformers' forward runs with its own cache"
        not_taken("our own decoding steps are", model, reason, instead)
        reason = _refusal(model, lambda: CacheDecoder(model))
        if reason is None:
            return "cache"
        apart = _refusal(model, lambda: ByLength(lambda: CacheDecoder(model, padded=False)))
    if apart is None:
        not_taken("steps over prompts of different lengths are", model, reason, "prompts of each length run apart")
        return "cache by length"
    check_decoder(model)
    not_taken("steps with transformers' cache are", model, apart, "every step runs whole rows")
    return "whole"


_STEPS = 4


def _refusal(model: PreTrainedModel, make: Callable[[], Decoder], *, replaces: bool = False) -> str | None:
    """Why a decoder cannot be used; None where it gives the logits of the model's forward over each row alone.

    Two prompts of different lengths have two rows each, and one row leaves between steps. See `switches` for what the
    rows cross. replaces: as in `difference`.
    """
    long, short = (row[0] for row in trial_rows(model, (9 + _STEPS, 7 + _STEPS)))
    mask = torch.ones(2, 9, dtype=torch.bool, device=long.device)
    mask[1, :2] = False
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < vocabulary(model):
        long[-3] = pad  # a completion may hold it, and RoBERTa does not count it as a position
    ids = torch.stack([long[:9], F.pad(short[:7], (2, 0))])
    next_tokens = torch.stack([long[9:], short[7:]])

    def own() -> Tensor:
        with as_it_runs(model):
            return decoded()

    def decoded() -> Tensor:
        steps, rows = make(), torch.arange(4, device=ids.device)
        logits, found = steps.prefill(ids, mask, 2), []
        for t in range(_STEPS + 1):
            found.append(logits[torch.stack([(rows == row).nonzero()[0, 0] for row in (1, 2)])])
            if t == _STEPS // 2:
                rows = rows[steps.keep(torch.tensor([1, 2, 3], device=ids.device))]
            if t < _STEPS:
                logits = steps.step(next_tokens[rows // 2, t])
        return torch.stack(found)

    def plain() -> Tensor:
        whole = [model(input_ids=row[None], use_cache=False).logits[0, -_STEPS - 1 :] for row in (long, short)]
        return torch.stack(whole, dim=1)

    try:
        where = difference(model, plain, own, replaces=replaces)
    except Exception as error:  # for example weights of a class that our step cannot mix with plain tensors
        return f"a step over its weights raises {type(error).__name__}"
    return None if where is None else " ".join(filter(None, (where, "its own forward gives other logits")))
