"""Whether a model is a decoder of text, which reads no token ahead.

Training scores a whole row in one pass, and sampling sees the tokens so far alone. Both give a token the same
probability where the logits at a token depend on no later token. BERT is such a model only with `is_decoder` in its
config; XLNet, ProphetNet and CPM-Ant never are. A trial tells them apart. `_REFUSED` has the families that a trial on a
short row cannot tell.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_fast.lm.precision import trial
from rlhf_fast.lm.switches import agree, trial_rows

_AUDIO = "predicts several audio codes a step"
_DRAFT = "continues the hidden states of another model"
_REFUSED = {
    "blt": "cuts the bytes of a whole row into patches",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
    "reformer": "sorts its keys by random numbers",
}


def check_family(config: PreTrainedConfig, path: str) -> None:
    """ValueError where the family of the model at `path` is known to be no decoder of text."""
    if config.model_type in _REFUSED:
        kind = " or ".join(config.architectures or [config.model_type])
        reason = _REFUSED[config.model_type]
        raise ValueError(f"model: expected a decoder of text, got {kind} at {path}, which {reason}")


@torch.no_grad()
def check_decoder(model: PreTrainedModel) -> None:
    """ValueError where the logits of `model` at a token change with later tokens, where token ids are not enough, and
    where the logits are not finite."""
    (ids,), was, name = trial_rows(model, (9,)), model.training, type(model).__name__
    where = f" at {model.name_or_path}" if model.name_or_path else ""
    model.eval()
    try:
        with trial(model):
            whole, part = (model(input_ids=ids[:, :n], use_cache=False).logits for n in (9, 5))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"whose forward raises {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        got = f"{name}{where}, {reason}"
        raise ValueError(f"model: expected a decoder that takes token ids alone, got {got}") from error
    except Exception:  # a model that cannot run on this device; the first step says it
        return
    finally:
        model.train(was)
    if not whole.isfinite().any(-1).all():  # some models mask tokens with -inf
        got = f"NaN or infinity on a trial row from {name}{where}, whose weights are too large"
        raise ValueError(f"model: expected finite logits, got {got}")
    if not agree(whole[:, :5], part):
        hint = "; set is_decoder in its config" if getattr(model.config, "is_decoder", True) is False else ""
        raise ValueError(
            f"model: expected a decoder, whose logits at a token depend on no later token, got {name}{where}{hint}"
        )
