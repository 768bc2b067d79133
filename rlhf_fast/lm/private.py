"""Every name of transformers and peft that the package uses and they do not promise, here alone.

Where one is missing, what it was for is done the slower way (rows padded, layers called as they are) or, of an adapter
that could not be saved right, is an error. tests/test_upstream.py names each, so that an upgrade fails there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # its layers are called as they are
    Conv1D = None


# Which attention runs


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention function that a model of this config calls."""
    return getattr(config, "_attn_implementation", None)


@contextmanager
def attention_as(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Within, models of this config call the attention function registered under this name."""
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether a layer runs its forward again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


# The cache of keys and values


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, [B, K, S, D] both."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def repeat_rows(cache: DynamicCache, copies: int) -> None:
    """Each row `copies` times, in place, copies side by side."""
    cache.batch_repeat_interleave(copies)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """These rows alone, in place."""
    cache.batch_select_indices(rows)


# Layers


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out]: GPT-2's."""
    return Conv1D is not None and isinstance(module, Conv1D)


def plain_base(module: nn.Module) -> nn.Module | None:
    """The linear layer that `module` is, or that an adapter on it wraps; None for any other class of layer."""
    base = getattr(module, "base_layer", module)
    return base if type(base) is nn.Linear or (Conv1D is not None and type(base) is Conv1D) else None


def lora_deltas(module: nn.Module) -> list[Tensor] | None:
    """What each active LoRA adapter on a layer adds to its weight; None where the layer does anything else besides."""
    try:
        if module.disable_adapters or module.merged or module.lora_variant:
            return None
        return [module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A]
    except AttributeError:
        return None


# Adapters on a model that stays a model of transformers


def has_adapter(model: PreTrainedModel) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


def mark_adapter(model: PreTrainedModel, configs: dict[str, Any] | None = None) -> None:
    """As transformers' own `add_adapter` does: `save_pretrained` then saves the adapter alone."""
    if configs is not None:
        model.peft_config = configs
    model._hf_peft_config_loaded = True


def unmark_adapter(model: PreTrainedModel) -> None:
    del model.peft_config
    model._hf_peft_config_loaded = False


def adapter_config(model: PreTrainedModel, name: str) -> Any:
    return model.peft_config[name]


def with_saved_copy(module: nn.Module, name: str) -> nn.Module:
    """A module that is trained and saved with the adapter of this name, its original kept beside it."""
    from peft.utils import ModulesToSaveWrapper

    return ModulesToSaveWrapper(module, name)


def without_adapter(module: nn.Module, name: str, *, merge: bool) -> nn.Module | None:
    """What a layer becomes when its adapter is taken off (merge: added into its weight); None where it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer):
        if merge:
            module.merge()
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[name] if merge else module.original_module
    return None


def original_of(module: nn.Module) -> nn.Module:
    """The module as it was before `with_saved_copy`."""
    return module.original_module


Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]


def rotary_of(base: nn.Module) -> Rotary:
    """positions [S] -> cosines and sines [S, D] of the rotary embedding of a decoder of Llama's kind."""
    rotary, weight = base.rotary_emb, base.embed_tokens.weight

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(weight[:1], positions[None])  # the weight gives the dtype and the device
        return cos[0], sin[0]

    return tables
