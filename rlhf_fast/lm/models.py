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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from rlhf_fast.lm import adapters
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.packing import real_hidden

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


def load_tokenizer(path: str | Path, argument: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, which `argument` named. A pad token that the model has no embedding for is taken off:
    what is filled with is never looked at, but it is looked up.

    Raises ValueError where EOS, which then fills, has none either.
    """
    tokenizer = AutoTokenizer.from_pretrained(existing(path, argument))
    base = adapters.base_path(path)
    if Path(base).is_dir() and not Path(base, "config.json").is_file():
        return tokenizer
    embeddings = AutoConfig.from_pretrained(existing(base, argument)).get_text_config().vocab_size
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= embeddings:
        tokenizer.pad_token = None
    if tokenizer.pad_token_id is None and (tokenizer.eos_token_id or 0) >= embeddings:
        raise ValueError(
            f"{argument}: expected a pad or an EOS token among the {embeddings} embeddings of the model at {path}, got "
            f"{tokenizer.eos_token!r} with id {tokenizer.eos_token_id}"
        )
    return tokenizer


def check_tokenizer(path: str | Path, tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """ValueError unless the model at `path` reads the token ids of `tokenizer`, the policy's.

    A directory without a tokenizer cannot be checked.
    """
    if Path(existing(path, argument)).is_dir() and not Path(path, "tokenizer_config.json").is_file():
        return
    if load_tokenizer(path, argument).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{argument}: expected a model with the policy's tokenizer, found another in {path}")


def load_policy(
    path: str | Path, *, trainable: bool = True, lora: LoRA | None = None, shared: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The causal language model at `path` in fp32, dropout off; frozen unless `trainable`."""
    base = adapters.base_path(path)
    if shared is None:
        config = AutoConfig.from_pretrained(existing(base))
        if _is_classifier(config):
            raise ValueError(f"model: expected a language model, got {_kind(config)} at {base}")
        model, missing = _load(AutoModelForCausalLM, base)
        _check_complete("model", base, model, missing)
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
    argument = "reward" if head is None else "model"
    base = adapters.base_path(path)
    config = AutoConfig.from_pretrained(existing(base, argument))
    is_classifier = _is_classifier(config)
    if is_classifier and config.num_labels != 1:
        labels = config.num_labels
        raise ValueError(f"{argument}: expected a reward model with one label at {base}, got {labels} labels")
    if head is None and not is_classifier and not adapters.holds_score(path):
        kind = "an adapter without a score head" if adapters.is_adapter(path) else _kind(config)
        raise ValueError(f"reward: expected a reward model or an adapter with one, got {kind} at {path}")
    if shared is None:
        model, missing = _load(AutoModelForSequenceClassification, base, num_labels=1)
    else:
        model, missing = _scorer_on(adapters.base_of(shared, base)), []
    if not hasattr(model, "score"):
        kind = type(model).__name__
        raise ValueError(f"{argument}: expected a model with a `score` head (decoder type) at {base}, got {kind}")
    new = () if is_classifier else ("score.weight", "score.bias")
    _check_complete(argument, base, model, [name for name in missing if name not in new])
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


def existing(path: str | Path, argument: str = "model") -> str:
    """`path` itself, which `argument` named; ValueError where there is no such thing.

    A local path that is not there must not be looked for on the hub, which takes minutes to fail.
    """
    text = str(path)
    local = isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or os.sep in text[-1:]
    if not Path(text).is_dir():
        expected = f"{argument}: expected a checkpoint directory or a hub name, found no directory {text}"
        if local:
            raise ValueError(expected)
        try:
            _on_hub(text)
        except OSError as error:
            raise ValueError(f"{expected} and none of that name on the hub: {error}") from error
    return text


@functools.cache
def _on_hub(name: str) -> None:
    cached_file(name, "config.json")


def _predicting(sequences: Sequences) -> slice:
    P, T = sequences.prompt_ids.shape[1], sequences.response_ids.shape[1]
    if P == 0:
        raise ValueError("prompt_ids: expected at least one prompt token to predict from, got shape [B, 0]")
    return slice(P - 1, P + T - 1)


def _inputs(model: PreTrainedModel, sequences: Sequences) -> dict:
    mask_BL = sequences.attention_mask()
    return {**forward_inputs(model, sequences.input_ids(), mask_BL, position_ids(mask_BL)), "use_cache": False}


def _score(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    weight = next(model.score.parameters())
    with torch.autocast(hidden.device.type, enabled=False):  # in bf16 a score would have two or three digits
        scores = model.score(hidden.to(weight.dtype)).squeeze(-1).float()
    return scores - getattr(model.config, "score_offset", 0.0)


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


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _kind(config: PreTrainedConfig) -> str:
    return " or ".join(config.architectures or ["a model of no known kind"])


def _load(kind: type, path: str, **options: int) -> tuple[PreTrainedModel, list[str]]:
    """The model at `path` in fp32, and the names of its weights that were not there and are random now."""
    with _quiet_loading():
        model, found = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
    return model, sorted(found["missing_keys"])


def _check_complete(argument: str, path: str, model: PreTrainedModel, missing: list[str]) -> None:
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{argument}: expected all weights of {type(model).__name__} at {path}, found no {names}")


@functools.cache
def _forward_parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bar for every file, and no report of missing weights, which we make one of ourselves."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
