"""A transformers decoder taken apart into the few functions that a one-token step calls.

transformers' forward does the same arithmetic behind masks, caches, output classes and hooks, which cost a small model
more time than the arithmetic. Here the query, key and value projections become one matmul, and small gate and up
projections another. An RMS norm is one call. A small LoRA adapter is added to its weight. Three layouts are known:
Llama's (Qwen, Mistral, Gemma, ...), GPT-2's and OPT's.

A model may have one of these layouts and still compute something else. The caller of `read` therefore compares with the
model's own forward, as `engine.decoder` does. Modules that are not plain layers (large adapters, quantised weights) are
called as modules.

Shapes: n rows, H hidden, D head size, K key/value heads, Q query heads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_fast.lm.layers import is_silu
from rlhf_fast.lm.private import Part, attention_of, is_transposed, lora_deltas, plain_base, rotary_of
from rlhf_fast.ops.layers import swiglu
from rlhf_fast.ops.private import has_forward_hooks
from rlhf_fast.rollout import cpu

Function = Callable[[Tensor], Tensor]

# Projections side by side are copies of their weights, and so is a weight with its adapter added. For a weight of more
# bytes than this the matmul takes so long that a copy saves nothing.
_MOST_COPIED = 1 << 20
# Rotary embeddings whose tables do not depend on how long the sequence has become.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class Block(NamedTuple):
    """One layer of a decoder."""

    attention_norm: Function
    qkv: Function  # [n, H] -> [n, (Q + 2 K) D], the heads of q, then k, then v
    q_norm: Function | None  # of each head
    k_norm: Function | None
    attention_out: Function
    attention_post_norm: Function | None
    mlp_norm: Function
    mlp: Function
    mlp_post_norm: Function | None
    scaling: float
    softcap: float | None  # of the attention scores
    window: int | None  # tokens that a token of a sliding-window layer sees, the token itself included


class Blocks(NamedTuple):
    """A whole decoder."""

    embed: Callable[[Tensor, Tensor], Tensor]  # tokens [n], positions [n] -> [n, H]
    blocks: list[Block]
    norm: Function  # of the last layer's output
    head: Function  # [n, H] -> [n, V], softcap included
    rope: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # positions [S] -> cos, sin [S, D]
    query_heads: int
    key_value_heads: int
    head_dim: int


def read(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Blocks | None:
    """The model's blocks; None where the layout is unknown.

    dtype: what matrices are cast to, as by autocast; None leaves them.
    The blocks hold copies of some weights, so call `read` again whenever the weights have changed.
    """
    base, config = model.base_model, model.config.get_text_config()
    head: Part = model.get_output_embeddings()
    try:
        if config.model_type == "gpt2":
            parts = _gpt2(base, dtype)
        elif config.model_type == "opt":
            parts = _opt(base, dtype)
        else:
            parts = _llama(base, config, dtype)
    except AttributeError:  # a layer without the parts of the layout
        return None
    if parts is None:
        return None
    embed, blocks, norm, rope = parts
    heads = config.num_attention_heads
    return Blocks(
        embed,
        blocks,
        norm,
        _head(_linear([head], dtype), config),
        rope,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _llama(base: Part, config: PreTrainedConfig, dtype: torch.dtype | None) -> tuple | None:
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") not in _FIXED_ROPE:
        return None
    rope, eager = rotary_of(base), attention_of(config) == "eager"
    # Mistral's layers read their window from the config. Where types of layers differ, each attention has its own.
    window = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    blocks = []
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if hasattr(attention, "q_norm") and attention.q_norm.weight.shape != (attention.head_dim,):  # OLMo 2: all heads
            return None
        four_norms = hasattr(layer, "pre_feedforward_layernorm")  # Gemma 2 has a norm behind each half too
        blocks.append(
            Block(
                _norm(layer.input_layernorm),
                _linear([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
                _norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
                _norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
                _linear([attention.o_proj], dtype),
                _norm(layer.post_attention_layernorm) if four_norms else None,
                _norm(layer.pre_feedforward_layernorm if four_norms else layer.post_attention_layernorm),
                _gated(mlp, dtype),
                _norm(layer.post_feedforward_layernorm) if four_norms else None,
                attention.scaling,
                getattr(attention, "attn_logit_softcapping", None) if eager else None,
                getattr(attention, "sliding_window", window),
            )
        )
    return lambda tokens, positions: base.embed_tokens(tokens), blocks, _norm(base.norm), rope


def _gpt2(base: Part, dtype: torch.dtype | None) -> tuple:
    blocks = []
    for layer in base.h:
        attention, mlp = layer.attn, layer.mlp
        blocks.append(
            _plain_block(
                layer.ln_1,
                _linear([attention.c_attn], dtype),
                _linear([attention.c_proj], dtype),
                layer.ln_2,
                _plain(_linear([mlp.c_fc], dtype), mlp.act, _linear([mlp.c_proj], dtype)),
                attention.scaling,
            )
        )
    return lambda tokens, positions: base.wte(tokens) + base.wpe(positions), blocks, base.ln_f, None


def _opt(base: Part, dtype: torch.dtype | None) -> tuple | None:
    decoder = base.decoder
    if decoder.final_layer_norm is None or decoder.project_in is not None:  # the 350M model has another layout
        return None
    table = decoder.embed_positions
    blocks = []
    for layer in decoder.layers:
        attention = layer.self_attn
        blocks.append(
            _plain_block(
                layer.self_attn_layer_norm,
                _linear([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
                _linear([attention.out_proj], dtype),
                layer.final_layer_norm,
                _plain(_linear([layer.fc1], dtype), layer.activation_fn, _linear([layer.fc2], dtype)),
                attention.scaling,
            )
        )

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return decoder.embed_tokens(tokens) + F.embedding(positions + table.offset, table.weight)

    return embed, blocks, decoder.final_layer_norm, None


def _plain_block(
    attention_norm: Function, qkv: Function, out: Function, mlp_norm: Function, mlp: Function, scaling: float
) -> Block:
    return Block(attention_norm, qkv, None, None, out, None, mlp_norm, mlp, None, scaling, None, None)


def _gated(mlp: Part, dtype: torch.dtype | None) -> Function:
    """The gated MLP. Small gate and up projections run as one matmul, larger ones apart."""
    sides, act, down = [mlp.gate_proj, mlp.up_proj], mlp.act_fn, _linear([mlp.down_proj], dtype)
    bases = [plain_base(side) for side in sides]
    if sum(_MOST_COPIED if base is None else base.weight.nbytes for base in bases) <= _MOST_COPIED:
        both = _linear(sides, dtype)

        def narrow(x: Tensor) -> Tensor:
            gate, up = both(x).chunk(2, dim=-1)
            return down(act(gate) * up)

        return narrow
    gate, up = (_linear([side], dtype) for side in sides)
    middle = swiglu if is_silu(act) else lambda left, right: act(left) * right
    return lambda x: down(middle(gate(x), up(x)))


def _plain(up: Function, act: Function, down: Function) -> Function:
    return lambda x: down(act(up(x)))


def _head(head: Function, config: object) -> Function:
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is None:
        return head
    return lambda x: softcap * torch.tanh(head(x) / softcap)


def _norm(module: Part) -> Function:
    """An RMS norm in one call. The weight is read off the norm's output, because some models store it less 1."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None or "RMSNorm" not in type(module).__name__:
        return module
    ones = torch.ones_like(module.weight, dtype=torch.float32)
    weight = (module(ones) * (1 + epsilon) ** 0.5).to(module.weight.dtype)

    compiled = cpu.rms_norm(weight, epsilon) if cpu.runs(weight) else None

    def norm(x: Tensor) -> Tensor:
        if compiled is not None and x.dtype is weight.dtype and cpu.runs(x) and x.is_contiguous():
            return compiled(x)
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, epsilon).to(x.dtype)  # torch warns of two dtypes

    return norm


def _linear(modules: Sequence[Part], dtype: torch.dtype | None) -> Function:
    """The outputs of several linear layers on the same input, side by side."""
    weights = [weight for weight in map(_weight, modules) if weight is not None]
    plain = len(weights) == len(modules)
    if plain and len(weights) > 1 and dtype is None:
        plain = sum(weight.nbytes for weight in weights) <= _MOST_COPIED
    if not plain:
        if len(modules) == 1:
            return modules[0]
        return lambda x: torch.cat([m(x) for m in modules], dim=-1)
    biases = [plain_base(module).bias for module in modules]  # pyright: ignore[reportOptionalMemberAccess]
    has_bias = any(bias is not None for bias in biases)
    weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).to(dtype or weights[0].dtype)
    zeros = (b if b is not None else w.new_zeros(len(w)) for b, w in zip(biases, weights, strict=True))
    bias = torch.cat(list(zeros)).to(weight.dtype) if has_bias else None
    return lambda x: F.linear(x, weight, bias)


def _weight(module: Part) -> Tensor | None:
    """The weight [out, in] of a plain layer, or of a small layer with its LoRA adapter added; None for the rest."""
    base = plain_base(module)
    if base is None or has_forward_hooks(module):
        return None
    weight = base.weight
    if base is not module:
        deltas = None if weight.nbytes > _MOST_COPIED else lora_deltas(module)
        if deltas is None:
            return None
        weight = sum(deltas, weight).to(weight.dtype)
    return weight.t() if is_transposed(base) else weight
