"""Policies, reward and value models: loading them.

`families` says which class a checkpoint is loaded as. Reward and value models are sequence classifiers with one label,
whose `score` head `passes` applies. transformers' own forward looks for the pad id to find the last token, which is
wrong where pad == eos, where padding is on the left, and where there is no pad token.

Of a checkpoint for text and images the parts for images are `parked` while the model runs, and saved with it.

A directory with a peft adapter is a model too: the adapter's base with the adapter on. With `lora` the adapter is
trained; otherwise it is merged into the weights. `shared` is a model whose frozen base the new model stands on.

Left out on purpose: devices, autocast and gradients, which belong to the caller.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from rlhf_fast.config.stages import Shard
from rlhf_fast.data.damage import read_json
from rlhf_fast.lm import adapters, manifest
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.causal import check_decoder, check_family
from rlhf_fast.lm.damage import names_damage
from rlhf_fast.lm.dtypes import DTYPES, Dtype, cast
from rlhf_fast.lm.families import is_classifier, language_class, reads, scorer_class, trunk_of
from rlhf_fast.lm.finite import not_finite
from rlhf_fast.lm.noise import as_before, silence
from rlhf_fast.lm.one_copy import one_copy
from rlhf_fast.lm.parked import freeze, park
from rlhf_fast.lm.paths import beside, existing
from rlhf_fast.lm.private import forget_renaming, made_of, score_head
from rlhf_fast.lm.saving import ADAPTER_SCORE, FILES
from rlhf_fast.lm.trust import trusted
from rlhf_fast.ranks import current

# How a checkpoint prepares images and sounds, and writes conversations with them: kept as it came.
PROCESSOR_FILES = (
    "audio_tokenizer_config.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def default_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU. Joins the run's other processes, if there are any."""
    ranks = current()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local) if ranks.size > 1 else torch.device("cuda")


@names_damage
def load_policy(
    path: str | Path,
    *,
    dtype: Dtype = "fp32",
    trainable: bool = True,
    lora: LoRA | None = None,
    shared: PreTrainedModel | None = None,
    shard: Shard = "none",
) -> PreTrainedModel:
    """The causal language model at `path`, with dropout off; frozen unless `trainable`.

    dtype: of the weights, as in `dtypes`; an adapter on them is fp32. lora: the adapter to train. shared: a model whose
        base the new model stands on; the base keeps its dtype. shard: how the caller is going to shard the model. All
        processes then call this, and a machine holds one copy of the weights, as in `one_copy`.
    Raises ValueError where `path` holds no decoder of text, a model with weights that are missing or not finite, or a
        damaged model of ours.
    """
    base = adapters.base_path(path)
    if shared is not None and adapters.can_share(path):
        _check_weights(path, base, "model", shared=True)
        return _prepare(adapters.base_of(shared, base), path, "model", trainable, lora, shared=True)
    config = AutoConfig.from_pretrained(existing(base), trust_remote_code=trusted())
    if is_classifier(config):
        raise ValueError(f"model: expected a language model, got {_kind(config)} at {base}")
    check_family(config, base)
    language = _class_at(base, "model", language_class, config)

    def load() -> PreTrainedModel:
        _check_weights(path, base, "model")
        model, missing = _load(language, base, config, _loaded_as(path, dtype, lora))
        _check_complete("model", base, model, missing)
        _check_finite("model", base, model)
        park(model, keep=trainable)
        if trainable:
            check_decoder(model)
        return _plain(model, path, "model", dtype, trainable, lora)

    return _prepare(one_copy(load, shard), path, "model", trainable, lora, shared=False)


@names_damage
def load_scorer(
    path: str | Path,
    *,
    dtype: Dtype = "fp32",
    head: Literal["normal", "zero"] | None = "normal",
    trainable: bool = True,
    lora: LoRA | None = None,
    shared: PreTrainedModel | None = None,
    shard: Shard = "none",
) -> PreTrainedModel:
    """The sequence classifier with one label at `path`, or a classifier made from the language model at `path`.

    head: a new `score` head is drawn from N(0, 1/(H+1)) (`normal`, for reward models; arXiv 2009.01325) or is 0
        (`zero`, for value models, so that the first values are 0). With None, `path` must have a head.
    shared: a causal language model whose base the classifier stands on. The other arguments are `load_policy`'s.
    Raises ValueError where the model has several labels, missing weights, weights that are not finite or no head, or is
        a damaged model of ours.
    """
    argument = "reward" if head is None else "model"
    base = adapters.base_path(path)
    config = AutoConfig.from_pretrained(existing(base, argument), trust_remote_code=trusted())
    scores = is_classifier(config)
    if scores and config.num_labels != 1:
        labels = config.num_labels
        raise ValueError(f"{argument}: expected a reward model with one label at {base}, got {labels} labels")
    if head is None and not scores and not adapters.holds_score(path):
        kind = "an adapter without a score head" if adapters.is_adapter(path) else _kind(config)
        raise ValueError(f"reward: expected a reward model or an adapter with one, got {kind} at {path}")

    def with_head(model: PreTrainedModel, missing: list[str]) -> PreTrainedModel:
        if not hasattr(model, "score"):
            kind = type(model).__name__
            raise ValueError(f"{argument}: expected a model with a `score` head (decoder type) at {base}, got {kind}")
        new = () if scores else ("score.weight", "score.bias")
        _check_complete(argument, base, model, [name for name in missing if name not in new])
        if not on_shared:
            _check_finite(argument, base, model)
        if not scores:
            _draw_head(model, head)
        if Path(path, ADAPTER_SCORE).is_file():
            for name, value in read_json(Path(path, ADAPTER_SCORE)).items():
                setattr(model.config, name, value)
        return model

    on_shared = shared is not None and adapters.can_share(path)
    if shared is not None and on_shared:
        _check_weights(path, base, argument, shared=True)
        model = with_head(_scorer_on(adapters.base_of(shared, base)), [])
        return _prepare(model, path, argument, trainable, lora, shared=True)
    check_family(config, base)
    scorer = _class_at(base, argument, scorer_class, config)
    reads(scorer, config).num_labels = 1

    def load() -> PreTrainedModel:
        _check_weights(path, base, argument)
        model, missing = _load(scorer, base, config, _loaded_as(path, dtype, lora))
        park(model, keep=trainable)
        return _plain(with_head(model, missing), path, argument, dtype, trainable, lora)

    return _prepare(one_copy(load, shard), path, argument, trainable, lora, shared=False)


@torch.no_grad()
def _draw_head(model: PreTrainedModel, head: str | None) -> None:
    """Sets a new `score` head. head: as in `load_scorer`."""
    score = score_head(model)
    std = 1 / math.sqrt(score.in_features + 1) if head == "normal" else 0.0
    nn.init.normal_(score.weight, std=std)
    if score.bias is not None:
        score.bias.zero_()


def value_head_on(policy: PreTrainedModel, saved: Path | None, shard: Shard = "none") -> PreTrainedModel:
    """A value model whose trunk is the policy's own, adapter included.

    saved: a directory with the head of a value model; None sets the head to 0. shard: as in `load_policy`.
    """
    model = _scorer_on(policy)
    head = score_head(model)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    if saved is not None:
        head.load_state_dict(score_head(load_scorer(saved, trainable=False, shard=shard)).state_dict())
    if adapters.has_adapter(policy):
        adapters.adopt(model, policy)
    return model.train(policy.training)


def mark_trained_here(model: PreTrainedModel) -> None:
    """Notes in the config that training ended every answer at the end of the turn; `trained_here` reads it."""
    model.config.score_at_end_of_turn = True


def trained_here(model: PreTrainedModel) -> bool:
    """Whether a stage of this package trained the reward model."""
    return getattr(model.config, "score_at_end_of_turn", hasattr(model.config, "score_offset"))


def set_score_offset(model: PreTrainedModel, offset: float) -> None:
    """Subtracts `offset` from the scores of `model` from now on; config.json keeps it as `score_offset`."""
    model.config.score_offset = float(offset)


def _scorer_on(language_model: PreTrainedModel) -> PreTrainedModel:
    """The classifier of this architecture on the trunk of `language_model` itself; its head is not initialised."""
    with as_before(language_model):
        config = copy.deepcopy(language_model.config)
    scorer = _class_at(str(language_model.name_or_path), "model", scorer_class, config)
    config = reads(scorer, config)
    config.num_labels = 1
    with torch.device("meta"):
        model = made_of(scorer, config, torch.float32)
    setattr(model, model.base_model_prefix, trunk_of(language_model))
    if hasattr(model, "score"):
        score_head(model).to_empty(device=language_model.device)
    model.name_or_path = language_model.name_or_path
    return model


def _plain(
    model: PreTrainedModel, path: str | Path, argument: str, dtype: Dtype, trainable: bool, lora: LoRA | None
) -> PreTrainedModel:
    """`model` with the adapter of directory `path` in its weights, if any, unless `lora` goes on training it."""
    model.requires_grad_(trainable and lora is None)
    if lora is not None:
        return model
    if adapters.is_adapter(path):
        adapters.put_on(model, path, lora, trainable=trainable)
        _check_finite(argument, path, model)
        adapters.merge(model, path)
        model.requires_grad_(trainable)
        cast(model, dtype)
    elif dtype == "mixed":
        cast(model, dtype)
    return model


def _prepare(
    model: PreTrainedModel, path: str | Path, argument: str, trainable: bool, lora: LoRA | None, *, shared: bool
) -> PreTrainedModel:
    """Puts the adapter on that stays an adapter, and turns noise off. shared: whether the base is another model's."""
    if shared:
        model.requires_grad_(trainable and lora is None)
    if lora is not None or shared and adapters.is_adapter(path):
        adapters.put_on(model, path, lora, trainable=trainable)
        _check_finite(argument, path, model)
    freeze(model)
    silence(model, trained=trainable)
    return model.train(trainable)


def _check_weights(path: str | Path, base: str, argument: str, *, shared: bool = False) -> None:
    """ValueError where this package wrote the model or its base, and its files are not as they were saved.

    shared: whether the base is another model's, whose loading has checked it.
    """
    for directory in dict.fromkeys((str(path), base)):
        if not (shared and directory == base):
            manifest.check(directory, argument, weights=True)


def _kind(config: PreTrainedConfig) -> str:
    return " or ".join(config.architectures or ["a model of no known kind"])


def _class_at(
    path: str, argument: str, choose: Callable[[PreTrainedConfig], type[PreTrainedModel]], config: PreTrainedConfig
) -> type[PreTrainedModel]:
    """What `choose` says of the model at `path`. argument: the name that messages give `path`."""
    try:
        return choose(config)
    except ValueError as error:
        raise ValueError(f"{argument}: {error} at {path}") from error


def _loaded_as(path: str | Path, dtype: Dtype, lora: LoRA | None) -> torch.dtype:
    """The dtype in which files are read.

    fp32 where an adapter is merged, because a sum in bf16 would lose it, and for mixed models, because transformers
    rounds more than the weights, such as the factor of Gemma's embeddings.
    """
    merged = lora is None and adapters.is_adapter(path)
    return torch.float32 if merged or dtype == "mixed" else DTYPES[dtype]


def _load(
    model_class: Any, path: str, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """The model at `path`, and the names of the weights that the files lack and that are random now."""
    part = reads(model_class, config)
    options = {} if part is config else {"key_mapping": {r"^language_model\.": ""}}  # the text model of a larger one
    with _quiet_loading(), _packages(config, path):
        model, found = model_class.from_pretrained(
            path, config=part, dtype=dtype, output_loading_info=True, trust_remote_code=trusted(), **options
        )
    if options:
        forget_renaming(model)
    if model.config.sub_configs:
        setattr(model, FILES, beside(path, PROCESSOR_FILES))
    _return_objects(model.config)
    _say_left_out(model, path, found["unexpected_keys"])
    return model, sorted(found["missing_keys"])


def _say_left_out(model: PreTrainedModel, path: str, names: Iterable[str]) -> None:
    """Warns where the files have layers past the config's last one, as where config.json was edited."""
    own = {re.sub(r"\d+", "#", name) for name in model.state_dict()}
    if past := sorted(name for name in names if re.sub(r"\d+", "#", name) in own):
        left = f"{past[0]} and {len(past) - 1} more" if len(past) > 1 else past[0]
        warnings.warn(f"model: config.json at {path} has fewer layers than the weights; left out: {left}", stacklevel=3)


def _check_complete(argument: str, path: str, model: PreTrainedModel, missing: list[str]) -> None:
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{argument}: expected all weights of {type(model).__name__} at {path}, found no {names}")


def _check_finite(argument: str, path: str | Path, model: PreTrainedModel) -> None:
    if (name := not_finite(model)) is not None:
        raise ValueError(f"{argument}: expected finite weights at {path}, got NaN or infinity in {name}")


def _return_objects(config: PreTrainedConfig) -> None:
    """Makes the model's forward return objects with named fields, without attention weights and inner states.

    Some config.json ask for tuples or for these extras. They serve a caller and say nothing about the model.
    """
    parts = [getattr(config, name, None) for name in config.sub_configs]
    for part in (config, *(part for part in parts if isinstance(part, PreTrainedConfig))):
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False


@contextmanager
def _packages(config: PreTrainedConfig, path: str) -> Iterator[None]:
    """Inside, transformers' hint on how to install a package that the family needs becomes one line."""
    try:
        yield
    except ImportError as error:
        package = re.search(r"requires the (\w+) library", str(error))
        if package is None:
            raise
        raise ValueError(
            f"model: expected a model that is made of installed packages, got {config.model_type} at {path}, which "
            f"needs the package {package[1]}"
        ) from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Inside, transformers shows no progress bars and does not report missing weights; `_check_complete` does."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
