"""The dtype of a model's weights: fp32, bf16, or bf16 in passes under autocast ("mixed").

A trained model has fp32 or bf16 weights. A frozen model beside trained bf16 weights has bf16 weights too, so that both
run the same passes.

A frozen model beside trained fp32 weights is "mixed". Its forward turns autocast on. Its linear layers are bf16, as
autocast casts them. Its embeddings and its head are bf16 where that changes no number, as in published checkpoints,
and fp32 elsewhere. Its vectors (norms, biases) and what its embeddings return are fp32. Its passes thus give the very
numbers of fp32 weights under autocast, in half the memory. Policy and reference agree before the first step.

Left out: float16, and bf16 in quantised layers.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.lm.fast_paths import not_taken
from rlhf_fast.lm.precision import HALVES, is_half
from rlhf_fast.lm.private import is_transposed
from rlhf_fast.lm.switches import trial_rows

Dtype = Literal["fp32", "bf16", "mixed"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.bfloat16}

_CONTEXTS = "rlhf_fast_autocasts"  # the attribute of a module that holds the contexts of its running calls


@torch.no_grad()
def cast(model: PreTrainedModel, dtype: Dtype) -> None:
    """Gives the weights of a model in fp32 this dtype, in place. Buffers, such as rotary frequencies, stay fp32.

    Where a pass of a mixed model raises, as in layers that autocast does not know, its weights stay fp32, and a warning
    says so.
    """
    if dtype == "mixed":
        mix(model)
        try:
            model.base_model(input_ids=trial_rows(model, (8,))[0], use_cache=False)
        except Exception as error:
            reason, dtype = f"a pass raises {type(error).__name__}", "fp32"
            not_taken("bf16 weights under autocast are", model, reason, "fp32 weights run")
    if dtype != "mixed":
        _convert(model.parameters(), DTYPES[dtype])


def mix(model: PreTrainedModel) -> None:
    """Makes a mixed model of a model, without a trial."""
    layers: Any = [m for m in model.base_model.modules() if isinstance(m, nn.Linear) or is_transposed(m)]
    linear = {id(layer.weight) for layer in layers}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # Gemma's embeddings multiply by a factor, which they round to their weight's dtype.
    plain = [module for module in embeddings if type(module).forward is nn.Embedding.forward]
    scaled = {id(module.weight) for module in embeddings if module not in plain}
    others = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in scaled | linear]
    _convert([layer.weight for layer in layers] + list(filter(_fits_bf16, others)), torch.bfloat16)
    for module in plain:
        module.register_forward_hook(_widened)
    for module in {model, model.base_model}:
        # Hooks, and not a forward that is replaced, because a module that holds its own method outlives its last use.
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)


def _fits_bf16(weight: Tensor) -> bool:
    """Whether bf16 holds every number of a weight. A weight without data counts as a published checkpoint's."""
    return weight.device.type == "meta" or torch.equal(weight.bfloat16().to(weight.dtype), weight)


def _convert(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def widen_new(model: PreTrainedModel, old: set[int]) -> None:
    """Makes half-precision weights fp32, but for those whose id is among `old`: the weights of a new adapter."""
    for parameter in model.parameters():
        if id(parameter) not in old and parameter.dtype in HALVES:
            parameter.data = parameter.data.float()


def as_it_runs(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """The context of code that computes with the weights of a model outside the model's forward: autocast if mixed."""
    if any(hook is _enter for hook in model._forward_pre_hooks.values()):
        return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_half(model))
    return nullcontext()


def _widened(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _enter(module: nn.Module, inputs: Any) -> None:
    weight = next(module.parameters())  # in a trial in fp32 (`precision`) the pass has to be in fp32 too
    context = torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=is_half(module))
    vars(module).setdefault(_CONTEXTS, []).append(context)
    context.__enter__()


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    vars(module)[_CONTEXTS].pop().__exit__(None, None, None)
