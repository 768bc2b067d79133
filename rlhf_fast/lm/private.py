"""Every name of transformers, peft and FSDP2 that the package uses and that they do not promise. They stand here alone.

Where a name is missing, the package takes a slower way: rows are padded, layers are called as modules. An adapter that
could not be saved right is an error. tests/test_upstream.py tests every name, so that an upgrade fails there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification as GenericForSequenceClassification

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # layers of this class are then called as modules
    Conv1D = None


Part = Any
"""A module whose parts are looked up by their names. The types of nn.Module say nothing about these parts."""

# Which attention runs


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention function that a model of this config calls."""
    return getattr(config, "_attn_implementation", None)


@contextmanager
def attention_as(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Inside, models of this config call the attention function that is registered under this name."""
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
    """The keys and values of each layer, [B, K, S, D] both: K key/value heads, S slots, D head size."""
    layers: list[Any] = [*cache.layers]
    return [(layer.keys, layer.values) for layer in layers]


def lengthen(cache: Cache, rows: int, slots: int) -> None:
    """Makes room for so many slots of so many rows in every layer, in place; what the slots hold is not set.

    A layer with a sliding window keeps no more than its window. A recurrent layer has no slots.
    """
    layers: list[Any] = [*cache.layers]
    for layer in layers:
        if not isinstance(getattr(layer, "keys", None), Tensor):
            continue
        kept = slots
        if getattr(layer, "is_sliding", False):
            kept, layer.cumulative_length = min(slots, layer.sliding_window - 1), slots
        layer.keys, layer.values = (x.new_empty(rows, x.shape[1], kept, x.shape[3]) for x in (layer.keys, layer.values))


def cache_bytes(cache: Cache) -> int:
    """The bytes of all keys, values and recurrent states."""
    layers: list[Any] = [*cache.layers]
    held: list[Any] = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        held += [state for layer in layers for state in getattr(layer, name, {}).values()]
    held += getattr(cache, "linear_cache", None) or []
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def choose_rows(cache: Cache, rows: Tensor) -> None:
    """Makes these rows, repeated or left out, the rows of every layer, in place. rows: [n] int64."""
    states = getattr(cache, "linear_cache", None)
    if states is not None:  # MiniMax's, which stand beside the layers; other layers have an empty list
        states += [[]] * (len(cache.layers) - len(states))
        cache.batch_select_indices(rows)
    else:
        cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


# Layers


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out], as the layers of GPT-2 do."""
    return Conv1D is not None and isinstance(module, Conv1D)


def plain_base(module: Part) -> Part | None:
    """The linear layer that `module` is, or that the adapter `module` wraps; None for any other class of layer."""
    base = getattr(module, "base_layer", module)
    return base if type(base) is nn.Linear or (Conv1D is not None and type(base) is Conv1D) else None


def lora_deltas(module: Part) -> list[Tensor] | None:
    """What each active LoRA adapter on a layer adds to the layer's weight; None where the layer does anything else."""
    try:
        if module.disable_adapters or module.merged or module.lora_variant or any(module.lora_bias.values()):
            return None
        return [module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A]
    except AttributeError:
        return None


# Adapters on a model that stays a model of transformers


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether `mark_adapter` has marked the model."""
    return getattr(model, "_hf_peft_config_loaded", False)


def mark_adapter(model: PreTrainedModel, configs: dict[str, Any] | None = None) -> None:
    """Marks the model as transformers' own `add_adapter` does: `save_pretrained` then saves the adapter alone.

    configs: adapter's name -> peft's config; None where peft has already set them.
    """
    if configs is not None:
        model.peft_config = configs
    model._hf_peft_config_loaded = True


def unmark_adapter(model: PreTrainedModel) -> None:
    """Undoes `mark_adapter`: `save_pretrained` saves the whole model again."""
    del model.peft_config
    model._hf_peft_config_loaded = False


def adapter_config(model: PreTrainedModel, name: str) -> Any:
    """peft's config of the model's adapter of this name."""
    return model.peft_config[name]


def with_saved_copy(module: nn.Module, name: str) -> nn.Module:
    """A copy of `module` that is trained and saved with the adapter of this name; the original stays beside it."""
    from peft.utils import ModulesToSaveWrapper

    return ModulesToSaveWrapper(module, name)


def without_adapter(module: Part, name: str, *, merge: bool) -> nn.Module | None:
    """The layer without its adapter; None where the layer has none. merge: the adapter is added into the weight.

    Adapters on several parameters of one module are wrapped around each other. The layer is then the innermost module.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    auxiliary = isinstance(module, AuxiliaryTrainingWrapper)
    if not auxiliary and not isinstance(module, BaseTunerLayer):
        return None
    layer: Part = module
    if auxiliary and not merge:
        return layer.original_module
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=[name])
    if merge:
        layer.merge()
    return layer.get_base_layer()


def untie(model: Part) -> None:
    """Makes the config say that the output head has a weight of its own, so that both weights are saved."""
    parts = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    for config in parts:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def original_of(module: Part) -> nn.Module:
    """The module as it was before `with_saved_copy`."""
    return module.original_module


# Models in shards


def begin_in_shards(model: Part) -> None:
    """Makes the model the root of its units, as its first pass would, but makes no weight whole.

    FSDP2 takes the first unit that runs for the root, and a pass of a frozen model may begin with a layer. A whole
    embedding stands on a machine's CPU once for each process.
    """
    model._get_fsdp_state()._lazy_init()


# Parts of a model by their names


def made_of(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights of this dtype, on the device of the context; `config` becomes the model's."""
    return model_class._from_config(config, dtype=dtype)


def rename_as(known: str, new: str) -> None:
    """Makes transformers read and write the weights of the class of name `new` by the names in files of `known`."""
    renaming = get_checkpoint_conversion_mapping(known)
    if renaming is not None:
        register_checkpoint_conversion_mapping(new, renaming, overwrite=True)


def forget_renaming(model: PreTrainedModel) -> None:
    """Makes `save_pretrained` write the names that the model itself has, not those of the files that it came from."""
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def score_head(model: PreTrainedModel) -> Part:
    """The `score` head of a classifier: a linear layer [1, H], or peft's wrapper around the layer."""
    return model.score


Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]


def rotary_of(base: Part) -> Rotary:
    """The rotary embedding of a decoder of Llama's kind, as a function: positions [S] -> cosines and sines [S, D]."""
    rotary, weight = base.rotary_emb, base.embed_tokens.weight

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(weight[:1], positions[None])  # the weight gives the dtype and the device
        return cos[0], sin[0]

    return tables
