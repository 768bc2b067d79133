"""The forward passes that the stages need: logits and hidden states of the response tokens, scores and values.

Positions are counted from the mask, so that padding on either side changes nothing. Every pass enters its model by
`forward.within`.

Shapes: B rows, P prompt tokens, T response tokens, L = P + T, H hidden, V vocabulary.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from rlhf_fast.lm import balance, packing
from rlhf_fast.lm.forward import call, extra_runs, one_pass
from rlhf_fast.lm.limits import sides
from rlhf_fast.lm.packing import empty_run, real_hidden
from rlhf_fast.lm.precision import trial
from rlhf_fast.lm.private import score_head
from rlhf_fast.lm.sequences import Sequences, position_ids
from rlhf_fast.lm.switches import agree, difference, trial_rows
from rlhf_fast.ops.private import is_fake

_paddable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_countable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@one_pass
def response_logits(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The logits [B, T, V] that predict the response tokens; arbitrary where `response_mask` is False.

    Logits of the prompt are computed only where the model's forward knows no `logits_to_keep`.
    """
    predicting, mask_BL = _predicting(sequences), sequences.attention_mask()
    if not is_fake(mask_BL):
        if parts := sides(model.config, mask_BL.sum(dim=1)):
            extra = extra_runs(model, len(parts))
            found = torch.cat([_response_logits(model, sequences.rows(rows), predicting) for rows in parts])
            return _behind(model, found.index_select(0, torch.cat(parts).argsort()), extra)
        extra = extra_runs(model, 1)
        return _behind(model, _response_logits(model, sequences, predicting), extra)
    return _response_logits(model, sequences, predicting)


def _response_logits(model: PreTrainedModel, sequences: Sequences, predicting: slice) -> Tensor:
    """`response_logits` in one run of the layers."""
    mask_BL = sequences.attention_mask()
    if not is_fake(mask_BL) and not _can_pad_left(model) and not sequences.prompt_mask.all():
        return _logits_of_rows_on_the_left(model, sequences)
    return _logits(model, forward_inputs(model, sequences.input_ids(), mask_BL, position_ids(mask_BL)), predicting)


def _behind(model: PreTrainedModel, x: Tensor, runs: int) -> Tensor:
    """`x`, with so many empty runs of the model's layers behind it."""
    for _ in range(runs):
        x = x + empty_run(model.base_model)  # pyright: ignore[reportArgumentType]
    return x


@one_pass
def response_hidden(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The last hidden states [B, T, H] that predict the response tokens; arbitrary where `response_mask` is False."""
    predicting = _predicting(sequences)
    T = predicting.stop - predicting.start
    ids_BL, mask_BL = sequences.input_ids(), sequences.attention_mask()
    states_MH, starts_B = real_hidden(model.base_model, ids_BL, mask_BL, last=False)  # pyright: ignore[reportArgumentType]
    first_B = starts_B + sequences.prompt_mask.sum(dim=1) - 1
    # Where the mask is False stand the states of other tokens; nothing may read them.
    positions_BT = (first_B[:, None] + torch.arange(T, device=first_B.device)).clamp(max=len(states_MH) - 1)
    return states_MH.index_select(0, positions_BT.flatten()).view(*positions_BT.shape, -1)


@one_pass
def sequence_scores(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The score [B] fp32 at each row's last real token, less the model's normalisation offset."""
    mask_BL = sequences.attention_mask()
    states_MH, starts_B = real_hidden(model.base_model, sequences.input_ids(), mask_BL)  # pyright: ignore[reportArgumentType]
    return _score(model, states_MH[starts_B + mask_BL.sum(dim=1) - 1])


@one_pass
def token_values(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """V(s_t) [B, T] fp32: the score of the state before each response token; arbitrary where `response_mask` is False.

    The state before a token is the prompt with the response tokens before it.
    """
    return hidden_values(model, response_hidden(model, sequences))


def hidden_values(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """V [B, T] fp32 of hidden states [B, T, H] of the model's trunk."""
    return _score(model, hidden)


@one_pass
def idle(model: PreTrainedModel) -> Tensor:
    """0, from a pass over two tokens, in whose backward pass every trained weight gets a gradient of 0.

    Where a model is in shards, a process without rows makes it while the other processes make passes over theirs.
    """
    extra = extra_runs(model, 1)
    nothing = call(model, input_ids=trial_rows(model, (2,))[0], use_cache=False).logits.float().sum() * 0.0
    return _behind(model, nothing, extra)


def settle(model: PreTrainedModel, *, checkpointing: bool) -> bool:
    """Takes all trials of the model's passes now. Whether a pass may run the layers several times.

    checkpointing: whether the model is going to checkpoint its activations.
    """
    backbone: Any = model.base_model
    for part in (model, backbone):
        _takes_positions(part, trial_rows(model, (8,))[0])
    _can_pad_left(model)
    return packing.settle(backbone, checkpointing=checkpointing)


def forward_inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """The arguments of the model's forward for token ids, mask (True = real) and positions, [B, L] each."""
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if _takes_positions(model, ids):
        inputs["position_ids"] = positions
    return inputs


def _takes_positions(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether the model's forward takes positions that count from 0.

    Bloom's forward takes none (ALiBi). RoBERTa's positions begin behind the id of its padding, so that RoBERTa has to
    count them itself.
    """
    if "position_ids" not in forward_parameters(model):
        return False
    if is_fake(ids):
        return True
    if model not in _countable:
        backbone: Any = model.base_model
        (row,), positions = trial_rows(model, (8,)), torch.arange(8, device=ids.device)[None]
        try:
            with _trial_mode(model):
                usual = backbone(input_ids=row, use_cache=False)[0]
                _countable[model] = agree(backbone(input_ids=row, position_ids=positions, use_cache=False)[0], usual)
        except Exception:  # whatever the model does not bear about such inputs; the first pass says it
            return True
    return _countable[model]


@contextmanager
def _trial_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a trial of the model runs in eval mode, without gradients and in fp32."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), trial(model):
            yield
    finally:
        model.train(training)


def _predicting(sequences: Sequences) -> slice:
    P, T = sequences.prompt_ids.shape[1], sequences.response_ids.shape[1]
    if P == 0:
        raise ValueError("prompt_ids: expected at least one prompt token to predict from, got shape [B, 0]")
    return slice(P - 1, P + T - 1)


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor], columns: slice, real: Tensor | None = None) -> Tensor:
    """The logits [B, columns, V] of these columns alone. real: the real tokens; None where the mask says them."""
    positions = torch.arange(columns.start, columns.stop, device=inputs["input_ids"].device)
    keeps = "logits_to_keep" in forward_parameters(model)
    options: dict[str, Any] = {"logits_to_keep": positions} if keeps else {}
    asked = balance.asks()
    out = call(model, **inputs, use_cache=False, **options, **asked)
    if asked:
        real = inputs["attention_mask"] if real is None else real
        balance.record(out, real.flatten().nonzero().squeeze(1))
    return out.logits if keeps else out.logits[:, positions]


def _logits_of_rows_on_the_left(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """`response_logits` from rows that begin in the first column, for models in which padding changes what follows."""
    mask_BL, prompts_B = sequences.attention_mask(), sequences.prompt_mask.sum(dim=1)
    order = (~mask_BL).long().argsort(dim=1, stable=True)[:, : int(mask_BL.sum(dim=1).max())]
    ids, T = sequences.input_ids().gather(1, order), sequences.response_ids.shape[1]
    first, last = int(prompts_B.min()) - 1, min(int(prompts_B.max()) - 1 + T, ids.shape[1])
    mask = torch.ones_like(ids, dtype=torch.bool)
    real = torch.arange(ids.shape[1], device=ids.device) < mask_BL.sum(dim=1, keepdim=True)
    logits = _logits(model, forward_inputs(model, ids, mask, position_ids(mask)), slice(first, last), real)
    columns_BT = prompts_B[:, None] - 1 - first + torch.arange(T, device=ids.device)
    return logits[torch.arange(len(ids), device=ids.device)[:, None], columns_BT.clamp(max=last - first - 1)]


def _can_pad_left(model: PreTrainedModel) -> bool:
    """Whether padding on the left leaves a row's hidden states as they are."""
    if model not in _paddable:
        backbone: Any = model.base_model
        rows, width = trial_rows(model, (7, 11)), 11

        def states(ids: Tensor, mask: Tensor) -> Tensor:
            out = backbone(**forward_inputs(backbone, ids, mask, position_ids(mask)), use_cache=False)
            return out[0][mask]

        def alone() -> Tensor:
            return torch.cat([states(row, torch.ones_like(row, dtype=torch.bool)) for row in rows])

        def padded() -> Tensor:
            gaps = [width - row.shape[1] for row in rows]
            ids = torch.cat([F.pad(row, (gap, 0)) for row, gap in zip(rows, gaps, strict=True)])
            gap_B = torch.tensor(gaps, device=ids.device)[:, None]
            return states(ids, torch.arange(width, device=ids.device) >= gap_B)

        try:
            with _trial_mode(model):
                _paddable[model] = difference(model, alone, padded, replaces=False) is None
        except Exception:  # whatever the model does not bear about such inputs
            _paddable[model] = False
    return _paddable[model]


def _score(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = score_head(model)
    weights = dict(head.named_parameters())
    wide = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):  # in bf16 a score would have two or three digits
        if all(weight.dtype == wide for weight in weights.values()):
            scores = head(hidden.to(wide)).squeeze(-1).float()
        else:
            wider = {name: weight.to(wide) for name, weight in weights.items()}
            scores = functional_call(head, wider, hidden.to(wide)).squeeze(-1).float()
    return scores - getattr(model.config, "score_offset", 0.0)


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """The names of the arguments of the model's forward."""
    # The object that torch.compile returns takes (*args, **kwargs). It hands out the bound methods of the model inside.
    return _parameters_of(type(model.get_input_embeddings.__self__))


@functools.cache
def _parameters_of(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)
