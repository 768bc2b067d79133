"""Scores and values of one reward or value model: the counterpart of `Objectives` for models with a `score` head."""

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.lm.forward import within
from rlhf_fast.lm.passes import hidden_values, sequence_scores, token_values
from rlhf_fast.lm.sequences import Sequences


class Scores:
    """The passes of a model with a scalar head.

    root: the model by whose forward the passes enter. For a value head on the policy's trunk this is the policy. Every
        other model is its own root.
    Shapes: B rows, T response tokens, H hidden.
    """

    def __init__(self, model: PreTrainedModel, *, root: PreTrainedModel | None = None) -> None:
        self.model, self.root = model, model if root is None else root

    def of(self, sequences: Sequences) -> Tensor:
        """The score [B] fp32 at each row's last real token, less the model's normalisation offset."""
        return within(self.root, sequence_scores, self.model, sequences)

    def values(self, sequences: Sequences) -> Tensor:
        """V(s_t) [B, T] fp32 of the state before each response token; arbitrary where `response_mask` is False."""
        return within(self.root, token_values, self.model, sequences)

    def values_of(self, hidden: Tensor) -> Tensor:
        """V [B, T] fp32 of hidden states [B, T, H] of the model's trunk."""
        return within(self.root, hidden_values, self.model, hidden)
