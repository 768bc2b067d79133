"""Decoder layers of Llama's kind in few operations, in place of transformers' own forward while rows are packed.

A layer there is some thirty small operations around seven matmuls, each of which reads and keeps tensors; here norms,
the gated middle of the MLP and the rotary embedding are one each (`ops.layers`, `ops.attention`). The projections are
called as the modules they are, so adapters, biases and quantised weights stay what they are.

What looks like such a layer need not compute the same: whoever uses this compares with the model's own forward
(`packing` does). Left out: caches, dropout, activation checkpointing, GPUs.
Shapes: N tokens side by side, H hidden; h heads of d.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.ops.attention import packed_attention
from rlhf_fast.ops.layers import add_rms_norm, swiglu
from rlhf_fast.ops.private import has_hooks

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_SILU = {"SiLU", "SiLUActivation"}


@contextmanager
def fused(backbone: PreTrainedModel) -> Iterator[None]:
    """Within, the layers of a backbone that `has_known_layers` run as here; they take packed rows alone."""
    replaced = {layer: _layer(layer) for layer in backbone.layers} | {backbone.norm: _norm(backbone.norm)}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def has_known_layers(backbone: PreTrainedModel) -> bool:
    """Whether `fused` knows all parts of the layers, and may pass over the modules that they are."""
    return refusal(backbone) is None


def refusal(backbone: PreTrainedModel) -> str | None:
    """Why the layers cannot be fused; None where they can."""
    layers, norm = getattr(backbone, "layers", None), getattr(backbone, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module) or not all(map(_has_parts, layers)):
        return "its layers do not have the parts of Llama's"
    norms, passed_over = [norm], []
    for layer in layers:
        attention = layer.self_attn
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name) for name in _children(attention) - _ATTENTION]
        passed_over += [attention, layer.mlp]
    if not all(map(_is_rms_norm, norms)):
        return "its norms are not RMS norms with a weight alone"
    if not all(map(_is_plain, norms + passed_over)) or any("forward" in vars(layer) for layer in layers):
        return "a module in its layers has a hook or a forward of its own, which they would pass over"
    if any(layer.self_attn.training and getattr(layer.self_attn, "attention_dropout", 0.0) for layer in layers):
        return "its attention has dropout"
    return None


def _has_parts(layer: nn.Module) -> bool:
    if _children(layer) != _LAYER:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    return (
        _children(attention) - {"q_norm", "k_norm"} == _ATTENTION
        and _children(mlp) in (_MLP, _MLP - {"act_fn"})
        and hasattr(attention, "scaling")
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_rms_norm(module: nn.Module) -> bool:
    is_one = "RMSNorm" in type(module).__name__ and [name for name, _ in module.named_parameters()] == ["weight"]
    return is_one and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))


def _is_plain(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not has_hooks(module)


def _layer(layer: nn.Module) -> Callable[..., Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    gated = swiglu if type(mlp.act_fn).__name__ in _SILU else lambda gate, up: mlp.act_fn(gate) * up

    def forward(
        hidden_states: Tensor, attention_mask: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> Tensor:
        """[1, N, H], the layout [B, 1, L, N] of `packing`, cosines and sines [1, N, d]."""
        x_NH, (rows, _, length, N) = hidden_states[0], attention_mask.shape
        normed_NH = _normed(layer.input_layernorm, x_NH)
        projections = (getattr(attention, f"{name}_proj")(normed_NH).view(N, -1, attention.head_dim) for name in "qkv")
        query, key, value = projections
        if hasattr(attention, "q_norm"):
            query, key = _normed(attention.q_norm, query), _normed(attention.k_norm, key)
        heads = packed_attention(
            *(x.transpose(0, 1) for x in (query, key, value)),
            attention_mask[0, 0, 0],
            rows,
            length,
            scale=attention.scaling,
            rotary=tuple(table[0].float() for table in position_embeddings),
        )
        delta_NH = attention.o_proj(heads.flatten(1)).to(x_NH.dtype)
        norm = layer.post_attention_layernorm
        x_NH, normed_NH = add_rms_norm(x_NH, delta_NH, norm.weight, _epsilon(norm))
        delta_NH = mlp.down_proj(gated(mlp.gate_proj(normed_NH), mlp.up_proj(normed_NH)))
        return (x_NH + delta_NH.to(x_NH.dtype))[None]

    return forward


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: _normed(module, x)


def _normed(module: nn.Module, x: Tensor) -> Tensor:
    return add_rms_norm(x, None, module.weight.to(x.dtype), _epsilon(module))[1]


def _epsilon(norm: nn.Module) -> float:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
