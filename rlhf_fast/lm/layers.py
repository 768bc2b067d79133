"""Decoder layers of Llama's kind in few operations, in place of transformers' own forward while rows are packed.

In transformers a layer is some thirty small operations around seven matmuls, and each operation reads and keeps
tensors. Here a norm is one operation, and so is the gated middle of the MLP; attention applies the rotary embedding
itself (`ops.layers`, `ops.attention`). The projections are called as modules, so adapters, biases and quantised weights
keep working.

A layer may have these parts and still compute something else. The caller therefore compares with the model's own
forward, as `packing` does. A cache takes the keys and values of these tokens, and earlier tokens in it are not seen.
Left out: dropout, activation checkpointing, GPUs.
Shapes: N tokens side by side, H hidden; h heads of d.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rlhf_fast.lm.private import Part
from rlhf_fast.ops.attention import packed_attention
from rlhf_fast.ops.layers import add_rms_norm, swiglu
from rlhf_fast.ops.private import has_hooks

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_SILU = {"SiLU", "SiLUActivation"}


def is_silu(act: object) -> bool:
    """Whether a gated MLP with this activation is `ops.layers.swiglu`."""
    return type(act).__name__ in _SILU


@contextmanager
def fused(backbone: PreTrainedModel) -> Iterator[None]:
    """Inside, the layers of `backbone` run by this module's forward, which takes packed rows alone.

    The backbone must be one that `has_known_layers`.
    """
    layers, norm = _parts(backbone)
    replaced = {layer: _layer(layer) for layer in layers} | {norm: _norm(norm)}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def has_known_layers(backbone: PreTrainedModel) -> bool:
    """Whether `fused` knows all parts of the layers, and may pass over these parts' own forwards."""
    return refusal(backbone) is None


def refusal(backbone: PreTrainedModel) -> str | None:
    """Why the layers cannot be fused; None where they can."""
    layers, norm = getattr(backbone, "layers", None), getattr(backbone, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module) or not all(map(_has_parts, layers)):
        return "its layers do not have the parts of Llama's"
    norms: list[Part] = [norm]
    passed_over: list[Part] = []
    attentions: list[Part] = [layer.self_attn for layer in layers]
    for layer, attention in zip(layers, attentions, strict=True):
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name) for name in _children(attention) - _ATTENTION]
        passed_over += [attention, layer.mlp]
    if not all(map(_is_rms_norm, norms)):
        return "its norms are not RMS norms with a weight alone"
    if not all(map(_is_plain, norms + passed_over)) or any("forward" in vars(layer) for layer in layers):
        return "a module in its layers has a hook or a forward of its own, which they would pass over"
    if any(attention.training and getattr(attention, "attention_dropout", 0.0) for attention in attentions):
        return "its attention has dropout"
    return None


def _parts(backbone: Part) -> tuple[list[Part], Part]:
    """The layers and the last norm."""
    return list(backbone.layers), backbone.norm


def _has_parts(layer: Part) -> bool:
    if _children(layer) != _LAYER:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    return (
        _children(attention) - {"q_norm", "k_norm"} == _ATTENTION
        and _children(mlp) in (_MLP, _MLP - {"act_fn"})
        and hasattr(attention, "scaling")
        and hasattr(attention, "layer_idx")
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_rms_norm(module: nn.Module) -> bool:
    is_one = "RMSNorm" in type(module).__name__ and [name for name, _ in module.named_parameters()] == ["weight"]
    return is_one and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))


def _is_plain(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not has_hooks(module)


def _layer(layer: Part) -> Callable[..., Tensor]:
    attention, mlp, index = layer.self_attn, layer.mlp, cast(int, layer.self_attn.layer_idx)
    gated = swiglu if is_silu(mlp.act_fn) else lambda gate, up: mlp.act_fn(gate) * up

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        **unread: object,
    ) -> Tensor:
        """hidden_states: [1, N, H]. attention_mask: the layout [B, 1, L, N] of `packing`.
        position_embeddings: cosines and sines [1, N, d]. past_key_values: gets the keys, turned, and the values."""
        x_NH, (rows, _, length, N) = hidden_states[0], attention_mask.shape
        normed_NH = _normed(layer.input_layernorm, x_NH)
        cos, sin = (table[0].float() for table in position_embeddings)
        projections = (getattr(attention, f"{name}_proj")(normed_NH).view(N, -1, attention.head_dim) for name in "qkv")
        query, key, value = projections
        if hasattr(attention, "q_norm"):
            query, key = _normed(attention.q_norm, query), _normed(attention.k_norm, key)
        if past_key_values is not None:
            turned = rotate(key, cos[:, None], sin[:, None])
            past_key_values.update(turned.transpose(0, 1)[None], value.transpose(0, 1)[None], index)
        heads = packed_attention(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            attention_mask[0, 0, 0],
            rows,
            length,
            scale=attention.scaling,
            rotary=(cos, sin),
        )
        delta_NH = attention.o_proj(heads.flatten(1)).to(x_NH.dtype)
        norm = layer.post_attention_layernorm
        x_NH, normed_NH = add_rms_norm(x_NH, delta_NH, norm.weight, _epsilon(norm))
        delta_NH = mlp.down_proj(gated(mlp.gate_proj(normed_NH), mlp.up_proj(normed_NH)))
        return x_NH[None] + delta_NH.to(x_NH.dtype)[None]  # no view, because FSDP hangs a hook on it

    return forward


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x [..., d]: elements i and i + d / 2 are turned together (arXiv 2104.09864)."""
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def _norm(module: Part) -> Callable[[Tensor], Tensor]:
    return lambda x: _normed(module, x)


def _normed(module: Part, x: Tensor) -> Tensor:
    return add_rms_norm(x, None, module.weight.to(x.dtype), _epsilon(module))[1]


def _epsilon(norm: Part) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
