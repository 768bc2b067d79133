"""One pass of a causal model over rows of any length, without their padding.

The real tokens of all rows stand side by side in one row, so that no layer works on padding. Attention must not look
across rows; `ops.packed_attention` does not. transformers hands a mask with four dimensions through to the attention
function unchanged. Our mask says which slots of [B, L] the tokens belong to.

A trial on the model at hand decides whether its rows are packed, and whether its layers run in few operations
(`layers`). Rows of other models are padded on the right. So are rows of a model that checkpoints its activations,
because such a model runs its layers again in the backward pass, when this attention is gone. Where padding on the right
changes what a row computes, as in a model that looks ahead, rows run one by one.

Prompts of a rollout are packed too (`prompt_states`), and their keys and values come out side by side.

Shapes: B rows, L slots, N real tokens, H hidden; h heads of d.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from rlhf_fast.lm import balance, layers
from rlhf_fast.lm.fast_paths import not_taken
from rlhf_fast.lm.forward import extra_runs
from rlhf_fast.lm.limits import sides
from rlhf_fast.lm.private import attention_as, attention_of, checkpoints_activations
from rlhf_fast.lm.sequences import position_ids
from rlhf_fast.lm.switches import difference, switching_length, trial_rows, windows
from rlhf_fast.ops import reference
from rlhf_fast.ops.attention import packed_attention
from rlhf_fast.ops.dispatch import has_kernel
from rlhf_fast.ops.private import is_fake

_NAME = "rlhf_fast_packed"
_packable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_paddable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_fusable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_unsaid: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # what a trial found, until it is said


def real_hidden(
    backbone: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, *, last: bool = True
) -> tuple[Tensor, Tensor]:
    """The last hidden states of the real tokens: states [M, H], and starts [B] of the rows in them.

    The state of a row's token t, counted over its real tokens, is states[start + t]. ids_BL, mask_BL: padded anywhere;
    at least one real token a row. last=False leaves out every row's last token, which predicts nothing.
    """
    if is_fake(mask_BL):
        return _planned(backbone, ids_BL[:, : max(1, mask_BL.shape[1] - (not last))])
    runs, starts_B = _runs(backbone, ids_BL, mask_BL, last)
    extra = extra_runs(backbone, len(runs))
    states = [run() for run, _ in runs]
    for _ in range(extra):
        states[0] = states[0] + empty_run(backbone)
    return states[0] if len(states) == 1 else torch.cat(states), starts_B


def empty_run(backbone: PreTrainedModel) -> Tensor:
    """0, from a run of the layers over two tokens, in whose backward pass every weight gets a gradient of 0."""
    hidden = backbone(input_ids=trial_rows(backbone, (2,))[0], use_cache=False)[0]
    return (hidden.float().sum() * 0.0).to(hidden.dtype)


Run = tuple[Callable[[], Tensor], int]  # a run of the layers, which gives hidden states [M, H]; M


def _runs(backbone: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, last: bool) -> tuple[list[Run], Tensor]:
    """The runs of `real_hidden`, and the starts [B] of the rows in their states side by side."""
    counts_B, limit = mask_BL.sum(dim=1), switching_length(backbone.config)
    if parts := sides(backbone.config, counts_B):
        found = [_runs(backbone, ids_BL[rows], mask_BL[rows], last) for rows in parts]
        sizes = [sum(size for _, size in runs) for runs, _ in found]
        behind = torch.tensor([0, *sizes[:-1]], device=ids_BL.device).cumsum(dim=0)
        starts_B = torch.cat([starts + n for (_, starts), n in zip(found, behind, strict=True)])
        return [run for runs, _ in found for run in runs], starts_B[torch.cat(parts).argsort()]
    last = last or bool(balance.asks())  # routers are balanced over last tokens too
    if limit is not None and int(counts_B.max()) == limit + 1:
        last = True  # without their last tokens these rows would be on the other side
    lengths_B = (counts_B if last else counts_B - 1).clamp(min=1)
    lengths = lengths_B.tolist()
    tokens, width, B = sum(lengths), max(lengths), len(lengths)
    starts_B = lengths_B.cumsum(dim=0) - lengths_B
    rows_N = torch.repeat_interleave(torch.arange(B, device=ids_BL.device), lengths_B, output_size=tokens)
    positions_N = torch.arange(tokens, device=ids_BL.device) - starts_B[rows_N]
    ids_N = ids_BL[mask_BL][(counts_B.cumsum(dim=0) - counts_B)[rows_N] + positions_N]
    slots_N = rows_N * width + positions_N
    gains = tokens < B * width or has_kernel("packed_attention", ids_BL)
    if gains and can_pack(backbone):
        layout = slots_N.expand(B, 1, width, tokens)
        return [(partial(_packed, backbone, ids_N, positions_N, layout, says=True), tokens)], starts_B
    if tokens < B * width and not _can_pad(backbone):
        return [(partial(_alone, backbone, [ids[None]]), len(ids)) for ids in ids_N.split(lengths)], starts_B
    padded_BL = ids_N.new_zeros(B * width).index_copy(0, slots_N, ids_N).view(B, width)
    starts_B = torch.arange(B, device=ids_BL.device) * width
    return [(lambda: _padded(backbone, padded_BL, slots_N)[0], B * width)], starts_B


def packs_prompts(backbone: PreTrainedModel) -> bool:
    """Whether `prompt_states` takes the model's prompts. Where packed attention has no kernel, nothing is gained.

    The first call takes the trial. A model that checkpoints its activations runs its layers once where nothing is
    trained, so that its prompts are packed.
    """
    weight: Any = next(backbone.parameters())
    if not has_kernel("packed_attention", weight):
        return False
    return _unsuited(backbone) is None if is_fake(weight) else _packs(backbone)


def prompt_states(
    backbone: PreTrainedModel, ids_BP: Tensor, mask_BP: Tensor, cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """The last hidden states [B, H] of left-padded prompts, and slots [N] of their real tokens in [B P].

    cache: gets the keys and values [1, h, N, d] of every layer, in the order of the slots.
    The model must be one that `packs_prompts`. Fake prompts count as full.
    """
    P, fake = ids_BP.shape[1], is_fake(mask_BP)
    slots_N = torch.arange(ids_BP.numel(), device=ids_BP.device) if fake else mask_BP.flatten().nonzero().squeeze(1)
    positions_N = position_ids(mask_BP).flatten().index_select(0, slots_N)
    rows_N, last_B = slots_N // P, torch.arange(P, ids_BP.numel() + 1, P, device=ids_BP.device)
    # The layout's slots begin each row at its place 0; `slots_N` has the padding on the left.
    layout = (rows_N * P + positions_N).expand(len(ids_BP), 1, P, len(slots_N))
    states_NH = _packed(backbone, ids_BP.flatten().index_select(0, slots_N), positions_N, layout, cache=cache)
    last_B = last_B if fake else mask_BP.sum(dim=1).cumsum(dim=0)
    return states_NH.index_select(0, last_B - 1), slots_N


def settle(backbone: PreTrainedModel, *, checkpointing: bool) -> bool:
    """Takes the trials of the model's rows now. Whether a pass may run the layers several times.

    checkpointing: whether the model is going to checkpoint its activations.
    """
    packs = not checkpointing and can_pack(backbone)
    return not (packs or _can_pad(backbone)) or switching_length(backbone.config) is not None


def _planned(backbone: PreTrainedModel, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """`real_hidden` of fake tensors, for a plan of memory: every row counts as full, and is packed like ragged rows."""
    if checkpoints_activations(backbone) or _unsuited(backbone):
        return _padded(backbone, ids_BL)
    slots_N, (B, L) = torch.arange(ids_BL.numel(), device=ids_BL.device), ids_BL.shape
    states_NH = _packed(backbone, ids_BL.flatten(), slots_N % L, slots_N.expand(B, 1, L, B * L))
    return states_NH, torch.arange(B, device=ids_BL.device) * L


def _padded(backbone: PreTrainedModel, ids_BL: Tensor, slots_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """slots_N: where in [B L] the real tokens stand; None where all tokens are real."""
    # With no mask transformers warns of pad ids it finds, which padding on the right hides from every real token.
    mask = None if is_fake(ids_BL) else torch.ones_like(ids_BL)
    out = backbone(input_ids=ids_BL, attention_mask=mask, use_cache=False, **balance.asks())
    states_BLH = balance.record(out, slots_N).last_hidden_state
    return states_BLH.flatten(0, 1), torch.arange(len(ids_BL), device=ids_BL.device) * ids_BL.shape[1]


def _packed(
    backbone: PreTrainedModel,
    ids_N: Tensor,
    positions_N: Tensor,
    layout: Tensor,
    *,
    says: bool = False,
    cache: DynamicCache | None = None,
) -> Tensor:
    """The last hidden states [N, H] of packed tokens.

    says: warn where the model's layers cannot be fused. cache: gets their keys and values.
    """
    inputs: dict[str, Any] = {"input_ids": ids_N[None], "position_ids": positions_N[None], "attention_mask": layout}
    inputs |= {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    wanted = _fusable.get(backbone, True) and has_kernel("add_rms_norm", ids_N)
    known = wanted and layers.has_known_layers(backbone)
    if says and wanted and not known:
        _not_fused(backbone, layers.refusal(backbone))
    with attention_as(backbone.config, _NAME), layers.fused(backbone) if known else nullcontext():
        return balance.record(backbone(**inputs, **balance.asks())).last_hidden_state[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    if options.get("position_bias") is not None:
        raise ValueError("attention: expected no position bias where rows are packed")
    rows, _, length, _ = attention_mask.shape
    heads, layout = (query[0], key[0], value[0]), (attention_mask[0, 0, 0], rows, length)
    if dropout:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return reference.packed_attention(*heads, *layout, scale=scale, dropout=dropout)[None], None
    device = query.device.type
    if torch.is_autocast_enabled(device):  # autocast casts the inputs of torch's attention, but not of our operator
        dtype = torch.get_autocast_dtype(device)
        heads = heads[0].to(dtype), heads[1].to(dtype), heads[2].to(dtype)
    return packed_attention(*heads, *layout, scale=scaling)[None], None


AttentionInterface.register(_NAME, _attention)


def can_pack(backbone: PreTrainedModel) -> bool:
    """Whether rows of the model are packed. The first call takes the trial; a warning says once where they are not."""
    if checkpoints_activations(backbone):
        _not_packed(backbone, "its layers run again in the backward pass, when the packed attention is gone")
        return False
    packs = _packs(backbone)
    if (reason := _unsaid.pop(backbone, None)) is not None:
        (_not_fused if packs else _not_packed)(backbone, reason)
    return packs


def _packs(backbone: PreTrainedModel) -> bool:
    """Whether rows can be packed, by a trial in the first call."""
    if backbone not in _packable:
        unsuited = _unsuited(backbone)
        reason = first = unsuited or _difference(backbone)
        _fusable[backbone] = first is None
        if unsuited is None and first is not None:
            reason = _difference(backbone)  # now with the model's own layers
        _packable[backbone] = reason is None
        if first is not None:
            _unsaid[backbone] = reason or first
    return _packable[backbone]


def _not_packed(backbone: PreTrainedModel, reason: str) -> None:
    not_taken("packed passes are", backbone, reason, "rows are padded instead")


def _not_fused(backbone: PreTrainedModel, reason: str | None) -> None:
    not_taken("fused layers are", backbone, str(reason), "transformers' own layers run")


def _unsuited(backbone: PreTrainedModel) -> str | None:
    """Why the config of a model rules packing out; None where every layer has full attention by torch's kernel, and
    the forward takes positions."""
    config = backbone.config
    if attention_of(config) != "sdpa":
        return f"its attention is {attention_of(config)}, not torch's sdpa"
    types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if windows(config) or not types <= {"full_attention"}:
        return "not all of its layers have full attention"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "its forward takes no positions"
    return None


def _can_pad(backbone: PreTrainedModel) -> bool:
    """Whether padding on the right leaves a row's hidden states as they are."""
    if backbone not in _paddable:
        rows, width = trial_rows(backbone, (7, 11)), 11

        def padded() -> Tensor:
            ids = torch.cat([nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])
            states, _ = _padded(backbone, ids)
            return torch.cat([states[n * width :][: row.shape[1]] for n, row in enumerate(rows)])

        reason = _compared(backbone, rows, padded, "padded rows", replaces=False)
        _paddable[backbone] = reason is None
        if reason is not None:
            not_taken("padded passes are", backbone, reason, "rows run one by one")
    return _paddable[backbone]


def _difference(backbone: PreTrainedModel) -> str | None:
    """What is wrong with two packed rows; None where each row has the hidden states that it has alone."""
    rows, lengths = trial_rows(backbone, (7, 11)), torch.tensor([7, 11])
    positions_N = torch.cat([torch.arange(n, device=backbone.device) for n in lengths.tolist()])
    slots_N = positions_N + torch.repeat_interleave(torch.tensor([0, 11]), lengths).to(backbone.device)
    inputs = torch.cat(rows, dim=1)[0], positions_N, slots_N.expand(2, 1, 11, 18)
    return _compared(backbone, rows, lambda: _packed(backbone, *inputs), "two rows side by side", replaces=True)


def _compared(
    backbone: PreTrainedModel, rows: list[Tensor], own: Callable[[], Tensor], subject: str, *, replaces: bool
) -> str | None:
    """What is wrong with the hidden states [N, H] that `own` computes of rows; None where they are each row's alone.

    replaces: as in `difference`.
    """
    training = backbone.training
    backbone.eval()
    try:
        with torch.autocast(backbone.device.type, enabled=False):
            where = difference(backbone, lambda: _alone(backbone, rows), own, replaces=replaces)
    except Exception as error:  # whatever the model does not bear about such inputs
        return f"{subject} raise {type(error).__name__} in it"
    finally:
        backbone.train(training)
    if where is None:
        return None
    return " ".join(filter(None, (where, f"{subject} have other hidden states than each alone")))


def _alone(backbone: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    """The last hidden states [N, H] of rows [1, L] that run one by one."""
    outs = (balance.record(backbone(input_ids=ids, use_cache=False, **balance.asks())) for ids in rows)
    return torch.cat([out.last_hidden_state[0] for out in outs])
