"""A model's forward, replaced by ours for some calls and put back. All others go to the forward that was there before.

Shapes: B rows, L slots, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from rlhf_fast.integrations.head import Distribution, Layer, token_fields
from rlhf_fast.integrations.states import packs, states_of
from rlhf_fast.ops.reference import IGNORED_ID

Fields = dict[str, Any]


class Replaced:
    """One model's forward, replaced until `restore`.

    forward: function of (model, *args, **kwargs), called as the model's forward would be. It returns `NotImplemented`
        for a call that the forward before it has to answer.
    within: makes the context that `forward` runs in, such as autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.active, before = model, True, model.forward
        self.before = before

        @wraps(type(model).forward)  # `generate` reads the arguments' names
        def ours(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = NotImplemented
            if self.active:
                with within():
                    out = forward(model, *args, **kwargs)
            return before(*args, **kwargs) if out is NotImplemented else out

        self.installed = model.forward = MethodType(ours, model)

    def restore(self) -> None:
        """The forward that was there before answers again, also where accelerate has wrapped ours since."""
        self.active = False
        if self.model.forward == self.installed:
            self.model.forward = self.before


def distribution_of(config: Any, temperature: float) -> Distribution:
    """What the model does with the product of hidden state and weight, read from its config as TRL reads it."""
    text = config.get_text_config()
    scale = next(
        (
            getattr(text, name)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if getattr(text, name, None) is not None
        ),
        None,
    )
    scaling = getattr(text, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
    softcap = getattr(text, "final_logit_softcapping", None)
    return Distribution(temperature, softcap, 1.0 if scale is None else float(scale))


def language_fields(
    model: PreTrainedModel,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    labels: Tensor,
    distribution: Distribution,
    names: tuple[str, ...],
    *,
    shifted: bool = False,
    summed: bool = False,
    pack: bool = True,
) -> tuple[Fields, Tensor, Any]:
    """The fields of TRL's head for a batch: (fields [B, L - 1], which labels count [B, L - 1] bool, backbone's output).

    args, inputs: of the model's backbone. labels: [B, L], of which slot t is predicted by the state of slot t - 1.
    shifted: by that of slot t, and the fields have [B, L]. names, summed: as in `token_fields`. pack: as in
    `states_of`. The backbone's output is None after a packed pass.
    """
    ids = labels if shifted else F.pad(labels[:, 1:], (0, 1), value=IGNORED_ID)
    found = states_of(model, args, inputs, ids != IGNORED_ID, pack)
    head: Any = model.get_output_embeddings()
    layer = Layer(head.weight, head.bias, distribution)
    states = found.states.to(head.weight.device)
    fields = token_fields(layer, states, found.of(ids, IGNORED_ID).to(states.device), names, summed=summed)
    slots = {name: found.to_slots(field) for name, field in fields.items()}
    if not shifted:
        slots = {name: field[:, :-1] for name, field in slots.items()}
        ids = ids[:, :-1]
    return slots, ids != IGNORED_ID, found.outputs


def ask_routers(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Asks the backbone for router logits where the model's config does, as the model's own forward does."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)


def summed_loss(
    model: PreTrainedModel,
    logprobs: Tensor,
    counted: Tensor,
    normalizer: Tensor | int | None,
    inputs: dict[str, Any],
    outputs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(the loss, the load-balancing loss or None): -sum of log-probs / normalizer, and the second by its coefficient.

    normalizer: None for the number of labels that count. inputs, outputs: of the backbone.
    """
    loss = -logprobs.sum() / (counted.sum().clamp(min=1) if normalizer is None else normalizer)
    if not inputs.get("output_router_logits"):
        return loss, None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = model.config.get_text_config()
    aux_loss: Any = load_balancing_loss_func(
        outputs.router_logits, text.num_experts, text.num_experts_per_tok, inputs.get("attention_mask")
    )
    return loss + getattr(text, "router_aux_loss_coef", 0.0) * aux_loss, aux_loss


def pooled_scores(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
    """The forward of a sequence classifier whose score reads one state a row; NotImplemented where no packed pass fits.

    The state is that of the row's last token that is not the padding token, as in transformers. Where padding is the
    EOS token, that may not be the row's last real token.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    ids, pad = inputs.get("input_ids"), model.config.get_text_config().pad_token_id
    if args or ids is None or pad is None or inputs.get("return_dict") is False:
        return NotImplemented
    last_B = (torch.arange(ids.shape[1], device=ids.device) * (ids != pad)).argmax(1)
    read = torch.zeros_like(ids, dtype=torch.bool).scatter(1, last_B[:, None], True)
    if not packs(model, inputs, read):
        return NotImplemented
    found = states_of(model, (), inputs, read, True)
    where = torch.zeros_like(ids).masked_scatter(found.real, found.where)
    score: Any = getattr(model, "score")  # noqa: B009  a name that PreTrainedModel does not have
    logits: Any = score(found.states[where.gather(1, last_B[:, None])[:, 0]])
    return SequenceClassifierOutputWithPast(logits=logits)
