"""Policies, reward and value models: loading, and the forward passes the stages need.

A policy is an `AutoModelForCausalLM`. Reward and value models are `AutoModelForSequenceClassification` with one label,
whose `score` head we apply ourselves: transformers looks for the pad id to find the last token, which is wrong as soon
as pad == eos, padding is on the left, or there is no pad token. Here every position comes from the mask.

A directory with a peft adapter is a model too, its base with the adapter on. With `lora` the adapter is what is
trained; otherwise it is merged into the weights. `shared` names a model whose frozen base the new one stands on.

Shapes: B rows, P prompt tokens, T response tokens, L = P + T, H hidden, V vocabulary.
Left out on purpose: devices, autocast and gradients, which belong to the caller.
"""

import copy
import functools
import inspect
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_fast import adapters
from rlhf_fast.adapters import LoRA
from rlhf_fast.packing import real_hidden

# transformers keeps no config.json beside an adapter, where the score offset would stand
_ADAPTER_SCORE = "score.json"


class Sequences(NamedTuple):
    """Left-padded prompts followed by right-padded responses; masks are bool, True = a real token."""

    prompt_ids: Tensor  # [B, P] int64
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] bool

    def rows(self, index: slice | Tensor) -> "Sequences":
        return Sequences(*(x[index] for x in self))

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(*(x.to(device) for x in self))

    def input_ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    def attention_mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(existing(path))


def load_policy(
    path: str | Path, *, trainable: bool = True, lora: LoRA | None = None, shared: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The causal language model at `path` in fp32, dropout off; frozen unless `trainable`."""
    base = adapters.base_path(path)
    if shared is None:
        with _quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(existing(base), dtype=torch.float32)
    else:
        model = adapters.base_of(shared, base)
    return _prepare(model, path, trainable, lora, shared is not None)


def load_scorer(
    path: str | Path,
    *,
    head: Literal["normal", "zero"] | None = "normal",
    trainable: bool = True,
    lora: LoRA | None = None,
    shared: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The sequence classifier with one label at `path`, or one made from the language model there.

    A new `score` head is drawn from N(0, 1/(H+1)) (`normal`, for reward models; arXiv 2009.01325) or set to 0
    (`zero`, for value models, so that the first values are 0); with None there has to be one. shared: a causal language
    model.
    """
    base = adapters.base_path(path)
    config = AutoConfig.from_pretrained(existing(base))
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"model: expected a reward model with one label at {base}, got {config.num_labels} labels")
    if head is None and not is_classifier and not adapters.is_adapter(path):
        kind = " or ".join(config.architectures or ["a model of no known kind"])
        raise ValueError(f"reward: expected a reward model or an adapter with one, got {kind} at {path}")
    if shared is None:
        with _quiet_loading():
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    else:
        model = _scorer_on(adapters.base_of(shared, base))
    if not hasattr(model, "score"):
        raise ValueError(f"model: expected a model with a `score` head (decoder type) at {base}, got {type(model)}")
    if not is_classifier:
        with torch.no_grad():
            std = 1 / math.sqrt(model.score.in_features + 1) if head == "normal" else 0.0
            nn.init.normal_(model.score.weight, std=std)
            if model.score.bias is not None:
                model.score.bias.zero_()
    if Path(path, _ADAPTER_SCORE).is_file():
        set_score_offset(model, json.loads(Path(path, _ADAPTER_SCORE).read_text())["score_offset"])
    return _prepare(model, path, trainable, lora, shared is not None)


def value_head_on(policy: PreTrainedModel, saved: Path | None) -> PreTrainedModel:
    """A value model whose trunk is the policy's own, adapter included; its head is 0, or that of directory `saved`."""
    model = _scorer_on(policy)
    for parameter in model.score.parameters():
        nn.init.zeros_(parameter)
    if saved is not None:
        model.score.load_state_dict(load_scorer(saved, trainable=False).score.state_dict())
    if adapters.has_adapter(policy):
        adapters.adopt(model, policy)
    return model.train(policy.training)


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """`save_pretrained`; of a model with an adapter this is the adapter alone, in peft's format."""
    model.save_pretrained(directory)
    if adapters.has_adapter(model) and hasattr(model.config, "score_offset"):
        (directory / _ADAPTER_SCORE).write_text(json.dumps({"score_offset": model.config.score_offset}) + "\n")


def response_logits(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The logits [B, T, V] that predict the response tokens; the prompt's are never computed."""
    predicting = _predicting(sequences)
    positions = torch.arange(predicting.start, predicting.stop, device=sequences.prompt_ids.device)
    inputs = _inputs(model, sequences)
    if "logits_to_keep" in _forward_parameters(type(model)):
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def response_hidden(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The last hidden states [B, T, H] that predict the response tokens; arbitrary where `response_mask` is False."""
    predicting = _predicting(sequences)
    T = predicting.stop - predicting.start
    states_MH, starts_B = real_hidden(model.base_model, sequences.input_ids(), sequences.attention_mask(), last=False)
    first_B = starts_B + sequences.prompt_mask.sum(dim=1) - 1
    # Where the mask is False come the states of other tokens, which nothing may look at.
    positions_BT = (first_B[:, None] + torch.arange(T, device=first_B.device)).clamp(max=len(states_MH) - 1)
    return states_MH.index_select(0, positions_BT.flatten()).view(*positions_BT.shape, -1)


def sequence_scores(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The score [B] fp32 at each row's last real token, less the model's normalisation offset."""
    mask_BL = sequences.attention_mask()
    states_MH, starts_B = real_hidden(model.base_model, sequences.input_ids(), mask_BL)
    return _score(model, states_MH[starts_B + mask_BL.sum(dim=1) - 1])


def token_values(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """V(s_t) [B, T] fp32: the score of the state before each response token (its last token is the state's end);
    arbitrary where `response_mask` is False."""
    return hidden_values(model, response_hidden(model, sequences))


def hidden_values(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """V [B, T] fp32 of hidden states [B, T, H] of the model's trunk."""
    return _score(model, hidden)


def set_score_offset(model: PreTrainedModel, offset: float) -> None:
    """Scores are reported less `offset` from now on; kept in config.json as `score_offset`."""
    model.config.score_offset = float(offset)


def position_ids(mask_BL: Tensor) -> Tensor:
    """Positions counted over real tokens only, so that left padding does not shift them."""
    return (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)


def forward_inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if "position_ids" in _forward_parameters(type(model)):  # Bloom and friends have none (ALiBi)
        inputs["position_ids"] = positions
    return inputs


def existing(path: str | Path) -> str:
    """`path` itself; a local path that is not there must not be looked for on the hub, which takes minutes to fail."""
    text = str(path)
    local = isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or os.sep in text[-1:]
    if local and not Path(text).is_dir():
        raise ValueError(f"model: expected a checkpoint directory or a hub name, found no directory {text}")
    return text


def _predicting(sequences: Sequences) -> slice:
    P, T = sequences.prompt_ids.shape[1], sequences.response_ids.shape[1]
    if P == 0:
        raise ValueError("prompt_ids: expected at least one prompt token to predict from, got shape [B, 0]")
    return slice(P - 1, P + T - 1)


def _inputs(model: PreTrainedModel, sequences: Sequences) -> dict:
    mask_BL = sequences.attention_mask()
    return {**forward_inputs(model, sequences.input_ids(), mask_BL, position_ids(mask_BL)), "use_cache": False}


def _score(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return model.score(hidden).squeeze(-1).float() - getattr(model.config, "score_offset", 0.0)


def _scorer_on(language_model: PreTrainedModel) -> PreTrainedModel:
    """The classifier of this architecture on the very trunk of `language_model`; its head is not initialised."""
    config = copy.deepcopy(language_model.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    setattr(model, model.base_model_prefix, language_model.base_model)
    if hasattr(model, "score"):
        model.score.to_empty(device=language_model.device)
    model.name_or_path = language_model.name_or_path
    return model


def _prepare(
    model: PreTrainedModel, path: str | Path, trainable: bool, lora: LoRA | None, shared: bool
) -> PreTrainedModel:
    model.requires_grad_(trainable and lora is None)
    if adapters.is_adapter(path) or lora is not None:
        adapters.put_on(model, path, lora, trainable=trainable)
        if lora is None and not shared:
            adapters.merge(model)
            model.requires_grad_(trainable)
    # Dropout would make the decode-time and training-time log-probs differ; it is off in every pass. The modules are
    # changed rather than eval() called because transformers checkpoints activations in train mode only.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.train(trainable)


@functools.cache
def _forward_parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bar for every file, and no report of a missing score head, which is what we are about to make."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
