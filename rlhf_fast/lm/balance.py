"""The load-balancing loss of a mixture of experts, on passes that pack or pad their rows.

Configs with `output_router_logits` ask for it (Switch Transformer, arXiv 2101.03961, equations 4 to 6): the loss of a
language model gains `router_aux_loss_coef` times E sum_e f_e P_e. Here f_e is the part of all choices that fell on
expert e, and P_e is the mean probability of e. Both are means over every real token of a pass and over all layers. The
rows' last tokens count too.

Each class of transformers has its own function for it. The model's own forward therefore computes it here, around a
trunk that hands back what the routers said in the passes before.

Left out: the seq2seq models, which add a second loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.lm.fast_paths import not_taken
from rlhf_fast.lm.forward import call
from rlhf_fast.lm.switches import agree, trial_rows

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_ASKS = {"output_router_logits": True}


class _Trunk:
    """What a trunk returns: its last hidden states and what its routers said. Everything else is None."""

    def __init__(self, states: Tensor, router_logits: tuple[Tensor, ...]) -> None:
        self.last_hidden_state, self.router_logits = states, router_logits

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class Routed:
    """What the routers said in the passes of one loss."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.logits: list[list[Tensor]] = []  # of each router, of each pass: [..., tokens, experts]

    def add(self, router_logits: tuple[Tensor, ...], real: Tensor | None) -> None:
        """real: the indices of the pass's real tokens; None where all tokens are real."""
        self.logits = self.logits or [[] for _ in router_logits]
        for found, logits in zip(self.logits, router_logits, strict=True):
            found.append(logits if real is None else logits.index_select(-2, real))

    def loss(self) -> Tensor:
        """The load-balancing loss, 0-dim, before its coefficient."""
        model: Any = self.model
        trunk, head = model.base_model, model.get_output_embeddings().weight
        out = _Trunk(head.new_zeros(1, 1, head.shape[-1]), tuple(torch.cat(each, dim=-2) for each in self.logits))
        usual = vars(trunk).get("forward")
        trunk.forward = lambda *_, **__: out
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=head.device)
            return call(self.model, input_ids=ids, use_cache=False, **_ASKS).aux_loss
        finally:
            del trunk.forward
            if usual is not None:
                trunk.forward = usual


_routed: ContextVar[Routed | None] = ContextVar("_routed", default=None)


def coefficient(model: PreTrainedModel) -> float:
    """The factor of the load-balancing loss; 0 where the model's config does not ask for the loss."""
    config = model.config.get_text_config()
    if not (getattr(config, "output_router_logits", False) or getattr(model.config, "output_router_logits", False)):
        return 0.0
    found = [getattr(owner, name, None) for owner in (model, config) for name in _COEFFICIENTS]
    return float(next((value for value in found if value is not None), 0.0))


def leave_out(model: PreTrainedModel, stage: str) -> None:
    """Says once that a stage does not add the load-balancing loss that the model's config asks for."""
    if coefficient(model):
        not_taken("output_router_logits is", model, f"{stage} has no load-balancing loss", "the loss is left out")


def balanced(model: PreTrainedModel) -> bool:
    """Whether `routed` gives the load-balancing loss of this model; False where its config does not ask for the loss.

    Says so where the config asks for a loss that the model's own forward does not compute.
    """
    if not coefficient(model):
        return False
    training = model.training
    model.eval()
    try:
        (ids,) = trial_rows(model, (8,))
        with routed(model) as found:
            record(model.base_model(input_ids=ids, use_cache=False, **asks()))
            mine = found.loss()
        with torch.no_grad():
            theirs = call(model, input_ids=ids, use_cache=False, **_ASKS).aux_loss
        reason = None if agree(mine.detach(), theirs) else "its load-balancing loss is another"
    except Exception as error:  # a class without the loss has no such field, or a field of another shape
        reason = f"its load-balancing loss raises {type(error).__name__}"
    finally:
        model.train(training)
    if reason is not None:
        not_taken("output_router_logits is", model, reason, "the loss is left out")
    return reason is None


@contextmanager
def routed(model: PreTrainedModel) -> Iterator[Routed]:
    """Inside, passes keep what the model's routers say. Passes without gradients, such as trials, do not."""
    found = Routed(model)
    before = _routed.set(found)
    try:
        yield found
    finally:
        _routed.reset(before)


def asks() -> dict[str, bool]:
    """The arguments by which a pass of a trunk asks for what its routers say."""
    return {**_ASKS} if _at_hand() is not None else {}


def record(out: Any, real: Tensor | None = None) -> Any:
    """Keeps what the routers said in a pass, where `asks` asked for it. Returns `out`, the trunk's output.

    real: the indices [N] of the real tokens among the pass's tokens; None where all tokens are real.
    """
    if (found := _at_hand()) is not None:
        found.add(out.router_logits, real)
    return out


def _at_hand() -> Routed | None:
    return _routed.get() if torch.is_grad_enabled() else None
