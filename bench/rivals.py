"""Who takes part in `python -m bench exactness`: ours, plain torch, and other libraries' kernels where installed.

Ours are three: the back end that the dispatch table chooses, and the kernels of the other two. Without a GPU the Triton
kernels of every library are interpreted, and our CUDA kernels are emulated.

Each is a function of logits, or of hidden states and weight, called as its library calls it. It returns per-token
log-probs and entropies, or None in place of entropies. Nothing is imported before it runs, because Triton decides
between its compiler and its interpreter at import.

Left out: flash-attn's own kernel, which needs CUDA to install; its arithmetic is written out below.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.backends import in_cuda, in_triton
from bench.case import EAGER, OURS, UPCAST
from bench.cases import eager_token_logprobs
from bench.linear_cases import TORCH_CHUNK
from bench.measure import OURS_IN_CUDA
from rlhf_fast import ops
from tests.emulation.triton_on_cpu import triton_on_cpu

Function = Callable[..., tuple[Tensor, Tensor | None]]
FLASH_BLOCK = 16 * 1024
TRL_CHUNK = 32768  # columns of a tile in TRL's trainers
OURS_IN_TRITON = f"{OURS}, Triton"


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """load: imports and returns the function. requires: modules. takes: the keyword options its function has.

    within: entered around loading, forward and backward.
    """

    name: str
    load: Callable[[], Function]
    requires: tuple[str, ...] = ()
    takes: frozenset[str] = frozenset()
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of this package."""
        return self.name.startswith(OURS)

    def installed(self) -> bool:
        """Whether the modules that it requires are there."""
        return all(importlib.util.find_spec(module) for module in self.requires)


# Plain torch


def scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """The logits after soft cap and temperature."""
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def eager(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, softcap: float | None = None) -> tuple:
    """Log-probs and entropies by log_softmax."""
    return eager_token_logprobs(scaled(logits, temperature, softcap), ids)


def eager_upcast(logits: Tensor, ids: Tensor, **options: float) -> tuple:
    """The same from logits widened to float32."""
    return eager(logits.float(), ids, **options)


def eager_head(hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, **options: float) -> tuple:
    """The same from hidden states, by a matmul in their dtype."""
    return eager(F.linear(hidden, weight, bias), ids, **options)


def eager_head_upcast(hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, **options: float):
    """Logits in the model's dtype, widened afterwards, as model code does."""
    return eager_upcast(F.linear(hidden, weight, bias), ids, **options)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None) -> tuple:
    """torch's own fused head; it has no entropy."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK)
    return -F.linear_cross_entropy(hidden, weight, ids, linear_bias=bias, reduction="none", options=options), None


class FlashFormula(torch.autograd.Function):
    """Online log-sum-exp of float32 blocks that starts from -inf and guards nothing, then z_t - lse."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        z = logits.float() * (1 / temperature)
        largest, total = torch.full((len(z),), -torch.inf, device=z.device), torch.zeros(len(z), device=z.device)
        for block in z.split(FLASH_BLOCK, 1):
            new = torch.maximum(largest, block.amax(1))
            total = torch.exp(largest - new) * total + torch.exp(block - new[:, None]).sum(1)
            largest = new
        lse = largest + torch.log(total)
        ctx.save_for_backward(logits, ids, lse)
        ctx.scale = 1 / temperature
        return z.gather(1, ids[:, None])[:, 0] - lse

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        logits, ids, lse = ctx.saved_tensors
        grad = -torch.exp(logits.float() * ctx.scale - lse[:, None])
        grad.scatter_add_(1, ids[:, None], torch.ones_like(upstream[:, None]))
        return (grad * (upstream * ctx.scale)[:, None]).to(logits.dtype), None, None


def flash_formula(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, None]:
    """Log-probs by `FlashFormula`; it has no entropy."""
    return FlashFormula.apply(logits, ids, temperature), None


# Other libraries


def load_trl() -> Function:
    """TRL's kernel on logits."""
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def load_trl_head() -> Function:
    """TRL's head in chunks."""
    from trl.kernels import ChunkedLogProbFunction

    def call(hidden, weight, ids, *, bias=None, temperature=1.0, softcap=None):
        args = hidden, weight, bias, ids, temperature, TRL_CHUNK, softcap
        return ChunkedLogProbFunction.apply(*args, 1.0, ("entropy",))[:2]

    return call


def load_liger_cross_entropy() -> Function:
    """Liger's cross-entropy on logits; it has no entropy."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    def call(logits, ids, *, softcap=None):
        # It writes the gradient over its input, so its input must not be autograd's leaf.
        return -liger_cross_entropy(logits * 1, ids, reduction="none", softcap=softcap), None

    return call


def load_liger_grpo() -> Function:
    """The log-prob is from its no-grad kernel, the gradient from the loss at ratio 1: -advantage * d log-prob."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    class Logprobs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, ids, temperature):
            ctx.save_for_backward(logits, ids)
            ctx.temperature = temperature
            return fused_selective_log_softmax(logits, ids, temperature)

        @staticmethod
        def backward(ctx, upstream):
            logits, ids = ctx.saved_tensors
            with torch.enable_grad():
                logits = logits.detach().requires_grad_()
                options = {"temperature": ctx.temperature, "beta": 0.0, "inplace": False, "loss_type": "grpo"}
                loss = triton_grpo_loss(logits, None, None, ids, -upstream[:, 0].contiguous(), **options)[0]
                return torch.autograd.grad(loss.sum(), logits)[0], None, None

    def call(logits, ids, *, temperature=1.0):
        followed = torch.stack((logits, torch.zeros_like(logits)), 1)  # [B, L + 1, V], the last place unused
        return Logprobs.apply(followed, ids[:, None], temperature)[:, 0], None

    return call


def load_liger_head() -> Function:
    """Liger's fused head with temperature and entropy."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def call(hidden, weight, ids, *, temperature=1.0):
        out = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, ids, temperature=temperature, return_entropy=True
        )
        return -out[0], out[1]

    return call


def load_liger_head_cross_entropy() -> Function:
    """Liger's fused head and cross-entropy; it has no entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(hidden, weight, ids, *, bias=None, softcap=None):
        return -liger_fused_linear_cross_entropy(hidden, weight, ids, bias, reduction="none", softcap=softcap), None

    return call


_T, _SCALED, _LIGER = {"temperature"}, {"temperature", "softcap"}, ("liger_kernel", "triton")


def _row(name: str, load: Callable[[], Function], takes: set[str], *requires: str) -> Implementation:
    within = triton_on_cpu if "triton" in requires else contextlib.nullcontext
    return Implementation(name=name, load=load, requires=requires, takes=frozenset(takes), within=within)


def _given(name: str, function: Function, takes: set[str]) -> Implementation:
    return _row(name, lambda: function, takes)


def _ours(function: Function, takes: set[str]) -> tuple[Implementation, ...]:
    row, needs = _given(OURS, function, takes), "rlhf_fast._cuda" if torch.cuda.is_available() else "pybind11"
    return (
        row,
        replace(row, name=OURS_IN_TRITON, requires=("triton",), within=in_triton),
        replace(row, name=OURS_IN_CUDA, requires=(needs,), within=in_cuda),
    )


FROM_LOGITS = (
    *_ours(ops.token_logprobs, _SCALED),
    _given(EAGER, eager, _SCALED),
    _given(UPCAST, eager_upcast, _SCALED),
    _row("TRL", load_trl, _T, "trl", "triton"),
    _row("Liger GRPO", load_liger_grpo, _T, *_LIGER),
    _row("Liger CE", load_liger_cross_entropy, {"softcap"}, *_LIGER),
    _given("flash-attn's formula", flash_formula, _T),
)
FROM_HIDDEN = (
    *_ours(ops.linear_token_logprobs, {"bias", *_SCALED}),
    _given(EAGER, eager_head, {"bias", *_SCALED}),
    _given(UPCAST, eager_head_upcast, {"bias", *_SCALED}),
    _row("TRL", load_trl_head, {"bias", *_SCALED}, "trl", "triton"),
    _row("Liger scaled CE", load_liger_head, _T, *_LIGER),
    _row("Liger CE", load_liger_head_cross_entropy, {"bias", "softcap"}, *_LIGER),
    *([_given("torch", torch_linear_cross_entropy, {"bias"})] if hasattr(F, "linear_cross_entropy") else []),
)
