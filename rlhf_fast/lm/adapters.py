"""LoRA adapters by peft, on models that stay plain transformers models, and further models on the same weights.

Every role (policy, reference, reward, value) is a model object of its own with at most one adapter. Roles that share a
base hold the very same parameters: `base_of` makes another model object on them, without the adapter. A pass without
the adapter is therefore a pass of another object. There is no switch that somebody has to flip back.

Adapters are saved and loaded in peft's format. Left out: adapters on the hub, several adapters on one object, and
training adapters that are not LoRA. Adapters of peft's other kinds are merged into the weights when they are read.
"""

import copy
import json
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedModel

from rlhf_fast.config import StageConfig
from rlhf_fast.lm.dtypes import widen_new
from rlhf_fast.lm.private import (
    adapter_config,
    has_adapter,
    is_transposed,
    mark_adapter,
    original_of,
    score_head,
    unmark_adapter,
    with_saved_copy,
    without_adapter,
)

if TYPE_CHECKING:
    import peft

_NAME = "default"  # the name of a model's only adapter; files do not hold it
_PREFIX = "base_model.model."  # the names of the weights in peft's files begin with it


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
    return Path(path, "adapter_config.json").is_file()


def base_path(path: str | os.PathLike) -> str:
    """The directory or hub name of the model that the adapter in `path` belongs to; `path` itself without an adapter.

    Raises ValueError where the adapter names no base, or names a directory that is not there.
    """
    if not is_adapter(path):
        return str(path)
    base = _read_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"model: expected a base_model_name_or_path in {path}/adapter_config.json, got {base!r}")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise ValueError(f"model: expected the base of the adapter in {path} at {base}, found no directory there")
    return base


def holds_score(path: str | os.PathLike) -> bool:
    """Whether `path` holds an adapter with a `score` head of its own."""
    return is_adapter(path) and "score" in (_read_config(path).get("modules_to_save") or [])


def put_on(model: PreTrainedModel, path: str | os.PathLike, lora: LoRA | None, *, trainable: bool) -> None:
    """Puts the adapter of directory `path` on its base `model`, or a new adapter where `path` is the base itself.

    lora: needed for a new adapter. An adapter that goes on being trained keeps its rank and alpha, and `lora` has to
        repeat them.
    A model with a `score` head trains and saves the head too.
    Raises ValueError where rank or alpha differ, and where the files hold too few or too many weights.
    """
    peft = _peft("model")
    scorer = hasattr(model, "score")
    if is_adapter(path):
        config = peft.PeftConfig.from_pretrained(path)
        if lora is not None:
            _check_same(lora, config, path)
    else:
        assert lora is not None  # only a stage that trains an adapter puts a new adapter on
        transposed = any(map(is_transposed, model.modules()))  # GPT-2
        config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", fan_in_fan_out=transposed
        )
    base = base_path(path)
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.inference_mode = not trainable
    _for_class_of(model, config)
    old = {id(parameter) for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):  # draws the same adapter whatever was drawn before
        torch.manual_seed(lora.seed if lora is not None else 0)
        peft.inject_adapter_in_model(config, model, _NAME)
    widen_new(model, old)
    mark_adapter(model)
    if is_adapter(path):
        weights = peft.load_peft_weights(str(path), device="cpu")
        weights = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
        if scorer:  # an adapter of a language model has no score head, so the model keeps its own
            head = original_of(score_head(model)).state_dict()
            weights = {f"score.{name}": tensor for name, tensor in head.items()} | weights
        lost = peft.set_peft_model_state_dict(model, weights, _NAME).unexpected_keys
        if lost := [name for name in lost if not name.startswith("score.")]:
            raise ValueError(f"model: expected an adapter of {base} in {path}, found weights without a place: {lost}")
        whole = peft.get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
        if missing := sorted(whole.keys() - weights.keys()):
            raise ValueError(f"model: expected all weights of the adapter in {path}, found no {', '.join(missing)}")


def adopt(scorer: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Makes `scorer` save the policy's adapter beside its own score head.

    The trunk of `scorer` is the policy's trunk with the policy's adapter.
    """
    config = copy.deepcopy(adapter_config(policy, _NAME))
    _for_class_of(scorer, config)
    scorer.score = with_saved_copy(score_head(scorer), _NAME)
    mark_adapter(scorer, {_NAME: config})


def stands_on(model: PreTrainedModel, path: str | os.PathLike) -> bool:
    """Whether the weights of `model`, its adapter aside, came from `path`."""
    return os.path.realpath(path) == os.path.realpath(str(model.name_or_path))


def base_of(model: PreTrainedModel, path: str | os.PathLike) -> PreTrainedModel:
    """Another model object on the parameters and buffers of `model`, without the adapter of `model`.

    path: the model that the caller wants. Raises ValueError unless `model` came from `path`.
    """
    if not stands_on(model, path):
        raise ValueError(f"share_base: expected adapters on the policy's base {model.name_or_path}, got base {path}")
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if has_adapter(twin):
        _take_off(twin, merge=False)
    return twin


def merge(model: PreTrainedModel) -> None:
    """Adds the adapter into the weights of `model` and leaves a plain model. No other model may share the weights."""
    _take_off(model, merge=True)


def _take_off(model: PreTrainedModel, *, merge: bool) -> None:
    for name, module in list(model.named_modules()):
        if (bare := without_adapter(module, _NAME, merge=merge)) is not None:
            model.set_submodule(name, bare)
    unmark_adapter(model)


def _read_config(path: str | os.PathLike) -> dict[str, Any]:
    return json.loads(Path(path, "adapter_config.json").read_text())


def _for_class_of(model: PreTrainedModel, config: Any) -> None:
    """Notes in peft's `config` the task, which peft's Auto classes read, and the `score` head, which peft saves."""
    others = [name for name in config.modules_to_save or [] if name != "score"]
    scorer = hasattr(model, "score")
    config.task_type = "SEQ_CLS" if scorer else "CAUSAL_LM"
    config.modules_to_save = [*others, "score"] if scorer else others or None


def _check_same(lora: LoRA, config: "peft.PeftConfig", path: str | os.PathLike) -> None:
    for name, mine, saved in (("lora_rank", lora.rank, "r"), ("lora_alpha", lora.alpha, "lora_alpha")):
        theirs = getattr(config, saved, None)
        if mine != theirs:
            raise ValueError(f"{name}: expected {theirs}, that of the adapter in {path} to train on, got {mine}")


def _peft(argument: str) -> ModuleType:
    if find_spec("peft") is None:
        raise ValueError(f'{argument}: expected peft for LoRA adapters, not installed: pip install -e ".[lora]"')
    import peft

    return peft
