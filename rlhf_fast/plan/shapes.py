"""Models of which only the shape is needed: configs read from disk or hub, models of fake tensors made from them."""

import copy
import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from rlhf_fast.lm.adapters import LoRA, base_path, put_on
from rlhf_fast.lm.dtypes import mix
from rlhf_fast.lm.families import language_class, reads, scorer_class
from rlhf_fast.lm.parked import freeze, park
from rlhf_fast.lm.paths import existing
from rlhf_fast.lm.private import made_of
from rlhf_fast.lm.trust import trusted
from rlhf_fast.training.learner import checkpoint_activations

Head = Literal["policy", "score"]


def read_config(path: str) -> PreTrainedConfig:
    """The model config of a checkpoint directory (an adapter's: its base), a config.json or a hub name, dropout off.

    Raises ValueError where there is none or its model_type is unknown.
    """
    if path.endswith(".json"):
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"model: expected a model's config.json, got {path}: {error}") from error
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError(f"model: expected a config with model_type, found none in {path}")
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        config = AutoConfig.from_pretrained(existing(base_path(path)), trust_remote_code=trusted())
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # as the stages do
    return config


class Shape(NamedTuple):
    """A model and how it runs: all that its activations depend on."""

    config: PreTrainedConfig
    head: Head
    dtype: torch.dtype
    autocast: bool = False  # bfloat16; a frozen model with bf16 weights is "mixed" then
    trained: bool = False
    checkpointing: bool = False
    lora_rank: int = 0

    @property
    def mixed(self) -> bool:
        """Whether frozen bf16 weights run under autocast."""
        return self.autocast and not self.trained and self.dtype == torch.bfloat16

    def instantiate(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of `config` with random weights, on the device of the context."""
        dtype = torch.float32 if self.mixed else self.dtype  # `build` makes a mixed model of fp32 weights
        scores = self.head == "score"
        model_class = (scorer_class if scores else language_class)(config)
        config = copy.deepcopy(reads(model_class, config))
        if scores:
            config.num_labels = 1
        model = made_of(model_class, config, dtype)
        if scores and not hasattr(model, "score"):
            raise ValueError(f"model: expected an architecture with a `score` head (decoder type), got {type(model)}")
        return model

    def build(self, layers: int | None = None) -> PreTrainedModel:
        """The model, or one of its first `layers` layers, on the meta device."""
        with torch.device("meta"):
            model = self.instantiate(self.config if layers is None else _shortened(self.config, layers))
            park(model, keep=False)  # the stages keep such parts in CPU memory, whatever the device
        model.requires_grad_(self.trained and not self.lora_rank)
        freeze(model)
        if self.lora_rank:
            with torch.device("meta"):
                put_on(model, "base", LoRA(self.lora_rank, 1.0, 0), trainable=True)
        if self.mixed:
            mix(model)
        if self.checkpointing:
            checkpoint_activations(model)
        return model.train(self.trained)


def period(config: PreTrainedConfig) -> int:
    """After how many layers the pattern of layer types repeats: 2 where sliding and full attention alternate."""
    types = getattr(config.get_text_config(), "layer_types", None) or ["same"]
    return next(n for n in range(1, len(types) + 1) if all(a == b for a, b in zip(types, types[n:], strict=False)))


def layer_count(config: PreTrainedConfig) -> int:
    return config.get_text_config().num_hidden_layers


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    count = layer_count(model.config)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"model: expected a decoder with a list of {count} layers, found none in {type(model).__name__}")


def _shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():  # what each layer is, by names such as layer_types and mlp_layer_types
        if isinstance(value, list) and len(value) == text.num_hidden_layers and "token" not in name:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def make_fake(model: PreTrainedModel) -> None:
    """Moves a model from the meta device to fake tensors of the FakeTensorMode that is on; ties stay ties."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, old in [*parameters, *buffers]:
            if old not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[old])
