"""The forward passes that the stages need: logits and hidden states of the response tokens, scores and values.

Positions are counted from the mask, so that padding on either side changes nothing. Every pass enters its model by
`forward.within`.

Shapes: B rows, P prompt tokens, T response tokens, L = P + T, H hidden, V vocabulary.
"""

import functools
import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.lm.forward import call, one_pass
from rlhf_fast.lm.packing import real_hidden
from rlhf_fast.lm.private import score_head
from rlhf_fast.lm.sequences import Sequences, position_ids


@one_pass
def response_logits(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The logits [B, T, V] that predict the response tokens. Logits of the prompt are computed only where the model's
    forward knows no `logits_to_keep`."""
    predicting = _predicting(sequences)
    positions = torch.arange(predicting.start, predicting.stop, device=sequences.prompt_ids.device)
    inputs = _inputs(model, sequences)
    if "logits_to_keep" in _forward_parameters(model):
        return call(model, **inputs, logits_to_keep=positions).logits
    return call(model, **inputs).logits[:, positions]


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


def forward_inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """The arguments of the model's forward for token ids, mask (True = real) and positions, [B, L] each."""
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if "position_ids" in _forward_parameters(model):  # Bloom and friends have none (ALiBi)
        inputs["position_ids"] = positions
    return inputs


def _predicting(sequences: Sequences) -> slice:
    P, T = sequences.prompt_ids.shape[1], sequences.response_ids.shape[1]
    if P == 0:
        raise ValueError("prompt_ids: expected at least one prompt token to predict from, got shape [B, 0]")
    return slice(P - 1, P + T - 1)


def _inputs(model: PreTrainedModel, sequences: Sequences) -> dict:
    mask_BL = sequences.attention_mask()
    return {**forward_inputs(model, sequences.input_ids(), mask_BL, position_ids(mask_BL)), "use_cache": False}


def _score(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = score_head(model)
    weight = next(head.parameters())
    with torch.autocast(hidden.device.type, enabled=False):  # in bf16 a score would have two or three digits
        scores = head(hidden.to(weight.dtype)).squeeze(-1).float()
    return scores - getattr(model.config, "score_offset", 0.0)


def _forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """The names of the arguments of the model's forward."""
    # The object that torch.compile returns takes (*args, **kwargs). It hands out the bound methods of the model inside.
    return _parameters_of(type(model.get_input_embeddings.__self__))


@functools.cache
def _parameters_of(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)
