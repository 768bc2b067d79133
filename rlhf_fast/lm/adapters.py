"""LoRA adapters by peft, on models that stay plain transformers models, and further models on the same weights.

Every role (policy, reference, reward, value) is a model object of its own with at most one adapter. Roles that share a
base hold the very same parameters: `base_of` makes another model object on them, without the adapter. A pass without
the adapter is therefore a pass of another object. There is no switch that somebody has to flip back.

Adapters are saved and loaded in peft's format. Left out: adapters on the hub, several adapters on one object, and
training adapters that are not LoRA. Adapters of peft's other kinds are merged into the weights when they are read.
"""

import copy
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.config import StageConfig
from rlhf_fast.data.damage import read_json
from rlhf_fast.lm import manifest, merging
from rlhf_fast.lm.dtypes import widen_new
from rlhf_fast.lm.eight_bits import import_bitsandbytes
from rlhf_fast.lm.private import (
    adapter_config,
    has_adapter,
    is_transposed,
    mark_adapter,
    original_of,
    score_head,
    with_saved_copy,
)
from rlhf_fast.lm.sharding import twin
from rlhf_fast.lm.time_limit import TooLong, time_limit

_NAME = "default"  # the name of a model's only adapter; files do not hold it
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PATIENCE = 5.0  # seconds for an adapter's regular expression to be tried on all modules
_PREFIX = "base_model.model."  # the names of the weights in peft's files begin with it
# The first values of a LoRA adapter that leave the base's weights as they are.
_ADDS_ALONE = ("gaussian", "eva", "orthogonal")


class LoRA(NamedTuple):
    """The adapter that a stage trains (arXiv 2106.09685): it adds alpha / rank * B A to a weight."""

    rank: int
    alpha: float
    seed: int  # for the random numbers of a new adapter


def lora_of(config: StageConfig) -> LoRA | None:
    """The adapter that `config` asks for; None trains all weights. Raises ValueError where peft is missing."""
    if not config.lora_rank:
        return None
    _peft("lora_rank")
    return LoRA(config.lora_rank, config.lora_alpha, config.seed)


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether directory `path` holds an adapter."""
    return Path(path, _CONFIG).is_file()


def base_path(path: str | os.PathLike) -> str:
    """The directory or hub name of the model that the adapter in `path` belongs to; `path` itself without an adapter.

    Raises ValueError where the adapter names no base, names a directory that is not there or that is an adapter too,
    where `path` holds adapters in folders of their own, and where `path` is incomplete or damaged.
    """
    manifest.check(path)
    if not is_adapter(path):
        found = sorted(str(file.parent) for file in Path(path).glob(f"*/{_CONFIG}"))
        if found and not Path(path, "config.json").is_file():
            raise ValueError(f"model: expected a model or one adapter in {path}, got several: {', '.join(found)}")
        return str(path)
    base = _read_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"model: expected a base_model_name_or_path in {path}/{_CONFIG}, got {base!r}")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise ValueError(f"model: expected the base of the adapter in {path} at {base}, found no directory there")
    if is_adapter(base):
        raise ValueError(f"model: expected a model as the base of the adapter in {path}, got another adapter, {base}")
    return base


def holds_score(path: str | os.PathLike) -> bool:
    """Whether `path` holds an adapter with a `score` head of its own."""
    return is_adapter(path) and "score" in (_read_config(path).get("modules_to_save") or [])


def can_share(path: str | os.PathLike) -> bool:
    """Whether the adapter in `path`, if any, leaves its base as it is, so that other models may stand on this base.

    Any other adapter is merged into a base of its own.
    """
    return not is_adapter(path) or _more_than_lora(_read_config(path)) is None


def put_on(model: PreTrainedModel, path: str | os.PathLike, lora: LoRA | None, *, trainable: bool) -> None:
    """Puts the adapter of directory `path` on its base `model`, or a new adapter where `path` is the base itself.

    lora: needed for a new adapter. An adapter that goes on being trained keeps its rank and alpha, and `lora` has to
        repeat them.
    A model with a `score` head trains and saves the head too.
    Raises ValueError where rank or alpha differ, where the adapter is of a kind that cannot be trained or merged, and
    where the files hold too few or too many weights.
    """
    peft = _peft("model")
    if is_adapter(path):
        settings = _read_config(path)
        with _one_line(path):
            config = peft.PeftConfig.from_pretrained(path)
        _check_kind(config, path)
        _check_patterns(model, settings, path)
        if lora is not None:
            _check_same(lora, settings, path)
        if settings["peft_type"] != "LORA":
            _put_on_by_peft(peft, model, config, path)
            return
    else:
        assert lora is not None  # only a stage that trains an adapter puts a new adapter on
        transposed = any(map(is_transposed, model.modules()))  # GPT-2
        others = [name for name, module in model.named_modules() if _is_router(module)]
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules="all-linear",
            exclude_modules=others or None,
            fan_in_fan_out=transposed,
        )
    base = base_path(path)
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.inference_mode = not trainable
    _for_class_of(model, config)
    old = {id(parameter) for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):  # draws the same adapter whatever was drawn before
        torch.manual_seed(lora.seed if lora is not None else 0)
        with _one_line(path):
            peft.inject_adapter_in_model(config, model, _NAME)
    widen_new(model, old)
    mark_adapter(model)
    if is_adapter(path):
        _load_weights(peft, model, path, keeps_base=lora is not None or can_share(path))


def _load_weights(peft: ModuleType, model: PreTrainedModel, path: str | os.PathLike, *, keeps_base: bool) -> None:
    """keeps_base: whether other models may stand on the base, so that the files may not change the base's weights."""
    weights = peft.load_peft_weights(str(path), device="cpu")
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    if hasattr(model, "score"):
        # An adapter of a language model has no score head, so the model keeps its own, and leaves the other head out.
        head = original_of(score_head(model)).state_dict()
        kept = ("score.", f"{model.base_model_prefix}.")
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(kept)}
        weights = {f"score.{name}": tensor for name, tensor in head.items()} | weights
    for name, tensor in model.state_dict().items():
        # peft saves the whole embedding beside an adapter on it.
        if name in weights and not _is_adapters(name) and keeps_base:
            if weights[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} for {name}, got {tuple(weights[name].shape)}"
                raise ValueError(f"model: expected the shapes of the base's weights in {path}, {shapes}")
            if not torch.equal(weights[name].to(tensor), tensor):
                raise ValueError(
                    f"model: expected an adapter that leaves its base as it is, got its own {name}: {path}"
                )
            del weights[name]
    with _one_line(path):
        found = peft.set_peft_model_state_dict(model, weights, _NAME)
    if lost := [name for name in found.unexpected_keys if not name.startswith("score.")]:
        base = base_path(path)
        raise ValueError(f"model: expected an adapter of {base} in {path}, found weights without a place: {lost}")
    own = dict(model.named_parameters())  # a weight that a tied head has too stands here once
    if missing := [name for name in found.missing_keys if name in own and _is_adapters(name)]:
        raise ValueError(f"model: expected all weights of the adapter in {path}, found no {', '.join(missing)}")


def _put_on_by_peft(peft: ModuleType, model: PreTrainedModel, config: Any, path: str | os.PathLike) -> None:
    """Puts an adapter that is not LoRA on `model`, to be merged: some kinds keep weights that their layers share."""
    config.task_type = None  # peft's classes for a task look for parts that a model of another task does not have
    if not hasattr(model, "score") and getattr(config, "modules_to_save", None):
        config.modules_to_save = [name for name in config.modules_to_save if name != "score"] or None
    with _one_line(path), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = peft.PeftModel.from_pretrained(model, str(path), adapter_name=_NAME, config=config)
        places = peft.get_peft_model_state_dict(whole, save_embedding_layers=False, adapter_name=_NAME).keys()
        names = peft.load_peft_weights(str(path), device="cpu").keys()
    mark_adapter(model)
    missing = [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]
    if missing:
        raise ValueError(f"model: expected all weights of the adapter in {path}, {missing[0].splitlines()[0]}")
    trunk = f"{_PREFIX}{model.base_model_prefix}."  # a head that the model does not have is left out
    if lost := sorted(name for name in names - places if name.startswith(trunk)):
        base = base_path(path)
        raise ValueError(f"model: expected an adapter of {base} in {path}, found weights without a place: {lost}")


@contextmanager
def _one_line(path: str | os.PathLike) -> Iterator[None]:
    """Inside, what peft says about an adapter that does not fit becomes one line."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model: expected an adapter that fits its base in {path}, got {reason[:300]}") from error


def _is_router(module: nn.Module) -> bool:
    """Whether a linear layer routes to experts by a forward of its own, which returns more than a product (Llama 4)."""
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return own and "router" in type(module).__name__.lower()


def adopt(scorer: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Makes `scorer` save the policy's adapter beside its own score head.

    The trunk of `scorer` is the policy's trunk with the policy's adapter.
    """
    config = copy.deepcopy(adapter_config(policy, _NAME))
    _for_class_of(scorer, config)
    scorer.score = with_saved_copy(score_head(scorer), _NAME)
    mark_adapter(scorer, {_NAME: config})


def own_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights that an adapter's files hold; None of a model without an adapter.

    peft would add the base's embedding where the adapter is on it, once for each of two tied layers.
    """
    if not has_adapter(model):
        return None
    return {name: tensor for name, tensor in model.state_dict().items() if _is_adapters(name)}


def stands_on(model: PreTrainedModel, path: str | os.PathLike) -> bool:
    """Whether the weights of `model`, its adapter aside, came from `path`."""
    return os.path.realpath(path) == os.path.realpath(str(model.name_or_path))


def base_of(model: PreTrainedModel, path: str | os.PathLike) -> PreTrainedModel:
    """Another model object on the parameters and buffers of `model`, without the adapter of `model`.

    path: the model that the caller wants. A model in shards has another as `sharding.twin` says.
    Raises ValueError unless `model` came from `path`.
    """
    if not stands_on(model, path):
        raise ValueError(f"share_base: expected adapters on the policy's base {model.name_or_path}, got base {path}")
    other = twin(model)
    if has_adapter(other):
        merging.take_off(other, _NAME, merge=False)
    return other


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself where it has no adapter, else a plain model with the adapter in its weights."""
    return merging.merged(model, _NAME) if has_adapter(model) else model


def merge(model: PreTrainedModel, path: str | os.PathLike) -> None:
    """Adds the adapter of directory `path` into the weights of `model` and leaves a plain model.

    No other model may share the weights. Raises ValueError where peft cannot merge the adapter.
    """
    merging.merge(model, _NAME, path, _trained_tokens(_read_config(path)))


def _read_config(path: str | os.PathLike) -> dict[str, Any]:
    return read_json(Path(path, _CONFIG))


def _for_class_of(model: PreTrainedModel, config: Any) -> None:
    """Notes in peft's `config` the task, which peft's Auto classes read, and the `score` head, which peft saves."""
    others = [name for name in config.modules_to_save or [] if name != "score"]
    scorer = hasattr(model, "score")
    config.task_type = "SEQ_CLS" if scorer else "CAUSAL_LM"
    config.modules_to_save = [*others, "score"] if scorer else others or None


def _more_than_lora(settings: dict[str, Any]) -> str | None:
    """The setting by which an adapter does more to a model than add to the weights that it is on; None without one.

    Such an adapter trains biases of the base, takes its first values out of the base's weights, or ties its weights to
    each other by views, which cannot be copied or trained apart from peft's own model.
    """
    init = settings.get("init_lora_weights", True)
    unusual = {
        "peft_type": settings.get("peft_type") != "LORA",
        "bias": settings.get("bias", "none") != "none",
        "init_lora_weights": isinstance(init, str) and init not in _ADDS_ALONE,
        "ensure_weight_tying": bool(settings.get("ensure_weight_tying")),
    }
    return next((f"{name} {settings.get(name)}" for name, holds in unusual.items() if holds), None)


def _is_adapters(name: str) -> bool:
    """Whether a weight of this name belongs to the model's adapter."""
    return _NAME in name.split(".")


def _trained_tokens(settings: dict[str, Any]) -> tuple[int, ...]:
    """The tokens whose embeddings an adapter trains by themselves."""
    indices = settings.get("trainable_token_indices") or settings.get("token_indices") or []
    return tuple(i for part in indices.values() for i in part) if isinstance(indices, dict) else tuple(indices)


def _check_kind(config: Any, path: str | os.PathLike) -> None:
    """config: peft's."""
    kind = config.peft_type.value
    if getattr(config, "alora_invocation_tokens", None):
        kind = "LoRA that waits for its alora_invocation_tokens"
    elif not (config.is_prompt_learning or config.is_adaption_prompt):
        kind = None
    if kind is not None:
        raise ValueError(f"model: expected an adapter that changes weights in {path}, got {kind}")
    if getattr(config, "layer_replication", None):
        raise ValueError(f"model: expected an adapter that keeps its base's layers in {path}, got layer_replication")
    if not any(Path(path, name).is_file() for name in _WEIGHTS):
        raise ValueError(f"model: expected the adapter's weights in {path}, found no {_WEIGHTS[0]}")


def _check_patterns(model: PreTrainedModel, settings: dict[str, Any], path: str | os.PathLike) -> None:
    """ValueError where what names modules is no regular expression, or takes longer than _PATIENCE."""
    if threading.current_thread() is not threading.main_thread():
        return  # no other thread can be broken off
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"):
        value = settings.get(field) or ()
        if field.endswith("_modules") and not isinstance(value, str):
            continue  # the ends of names, which are no regular expressions
        for pattern in [value] if isinstance(value, str) else [*value]:
            expected = f"model: expected {field} in {path}/{_CONFIG} to hold regular expressions"
            try:
                with time_limit(_PATIENCE):
                    matches = re.compile(pattern if field.endswith("_modules") else rf"(.*\.)?({pattern})").fullmatch
                    for name, _ in model.named_modules():
                        matches(name)
            except TooLong:
                raise ValueError(
                    f"{expected} that are tried on every module within {_PATIENCE:g} s, got {pattern!r:.200}"
                ) from None
            except re.error as error:
                raise ValueError(f"{expected}, got {pattern!r:.200} ({error})") from error


def _check_same(lora: LoRA, settings: dict[str, Any], path: str | os.PathLike) -> None:
    if (more := _more_than_lora(settings)) is not None:
        raise ValueError(
            f"lora_rank: expected plain LoRA to train on in {path}, got {more}; leave lora_rank out to merge it"
        )
    for name, mine, saved in (("lora_rank", lora.rank, "r"), ("lora_alpha", lora.alpha, "lora_alpha")):
        theirs = settings.get(saved)
        if mine != theirs:
            raise ValueError(f"{name}: expected {theirs}, that of the adapter in {path} to train on, got {mine}")


def _peft(argument: str) -> ModuleType:
    if find_spec("peft") is None:
        raise ValueError(f"{argument}: expected peft for LoRA adapters, not installed: pip install 'rlhf-fast[lora]'")
    import_bitsandbytes()  # peft imports it
    import peft

    return peft
