"""Checks a saved optimizer state against the weights that it moves, before a kernel reads the state.

torch's fused AdamW and bitsandbytes read as many numbers of a moment as the weight has. They do not look at the
moment's own size, so that the moments of a narrower model end in a crash, and those of a wider model in wrong steps.

Left out: the values. The checksums of a checkpoint are for them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.training.optimizers import MasterWeights

_BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit moments
_WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes' key for the tensors of a weight that FSDP leaves alone


def check_state(optimizer: torch.optim.Optimizer | MasterWeights, state: Any, names: dict[nn.Parameter, str]) -> None:
    """Raises ValueError unless `state` is a state_dict of this optimizer of these weights.

    The error names the weight, what was expected of its state and what came, for example: "state.pt: lm_head.weight:
    expected exp_avg of shape [64, 32] and dtype torch.float32, got shape [64, 16] and dtype torch.float32". A moment
    whose numbers lie in another order in memory than the weight's is replaced by a copy that has the weight's order.
    """
    if not isinstance(optimizer, MasterWeights):
        _check_inner(optimizer, state, names)
        return
    _expect(isinstance(state, dict) and {"masters", "inner"} <= state.keys(), "masters and inner", _keys(state))
    masters, saved = optimizer.masters, state["masters"]
    count = len(saved) if isinstance(saved, list) else type(saved).__name__
    _expect(count == len(masters), f"the fp32 copies of {len(masters)} weights", count)
    of_masters = {master: names[parameter] for parameter, master in optimizer.pairs}
    for master, copy in zip(masters, saved, strict=True):
        _check_tensor(of_masters[master], "the fp32 copy", copy, list(master.shape), (torch.float32,))
    _check_inner(optimizer.inner, state["inner"], of_masters)


def _check_inner(optimizer: torch.optim.Optimizer, state: Any, names: dict[nn.Parameter, str]) -> None:
    parts = {"state", "param_groups"}
    _expect(isinstance(state, dict) and parts <= state.keys(), "state and param_groups", _keys(state))
    saved, groups, own = state["state"], state["param_groups"], optimizer.param_groups
    _expect(isinstance(saved, dict), "a dict of the weights' states", type(saved).__name__)
    whole = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    sizes = [len(group.get("params", ())) for group in groups] if whole else type(groups).__name__
    expected = [len(group["params"]) for group in own]
    _expect(sizes == expected, f"groups of {expected} weights", sizes)
    for group, mine in zip(groups, own, strict=True):
        for key in mine.keys() & group.keys() - {"params"}:
            kind, got = type(mine[key]), type(group[key])
            _expect(kind is got, f"{key} of the weights to be a {kind.__name__}", got.__name__)
    at = [i for group in groups for i in group["params"]]
    parameters = dict(zip(at, (p for group in own for p in group["params"]), strict=True))
    _expect(len(parameters) == len(at), "a number of its own for each weight", at)
    for i, entry in saved.items():
        _expect(i in parameters, f"the states of weights 0 to {len(at) - 1}", f"a state of weight {i!r}")
        _check_weight(names[parameters[i]], parameters[i], entry)


def _check_weight(name: str, parameter: nn.Parameter, entry: Any) -> None:
    _expect(isinstance(entry, dict), f"a dict as the state of {name}", type(entry).__name__)
    inner = entry.get(_WRAPPED, {})
    _expect(isinstance(inner, dict), f"a dict as the state of {name}", type(inner).__name__)
    holders = {key: holder for holder in (entry, inner) for key in holder if key != _WRAPPED}
    step, shape = entry.get("step"), list(parameter.shape)
    if isinstance(step, Tensor):
        _check_tensor(name, "step", step, [], (torch.float32,))
    else:
        _expect(isinstance(step, int), f"a number of steps of {name}", type(step).__name__)
    quantised = {"state1", "state2"} & holders.keys()
    for key in ("state1", "state2") if quantised else ("exp_avg", "exp_avg_sq"):
        holder = holders.get(key, entry)
        kinds = (torch.float32, torch.uint8) if quantised else (parameter.dtype,)
        _check_tensor(name, key, holder.get(key), shape, kinds)
        if holder[key].dtype == torch.uint8:
            i, blocks = key[-1], math.ceil(parameter.numel() / _BLOCK)
            _check_tensor(name, f"qmap{i}", inner.get(f"qmap{i}", entry.get(f"qmap{i}")), [256], (torch.float32,))
            scales = inner.get(f"absmax{i}", entry.get(f"absmax{i}"))
            _check_tensor(name, f"absmax{i}", scales, [blocks], (torch.float32,))
        if holder[key].stride() != parameter.stride() and not holder[key].is_meta:
            holder[key] = torch.empty_like(parameter, dtype=holder[key].dtype, device="cpu").copy_(holder[key])


def _check_tensor(name: str, what: str, x: Any, shape: list[int], dtypes: tuple[torch.dtype, ...]) -> None:
    fits = isinstance(x, Tensor) and list(x.shape) == shape and x.dtype in dtypes and x.layout == torch.strided
    got = f"shape {list(x.shape)} and dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    kinds = " or ".join(str(dtype) for dtype in dtypes)
    _expect(fits, f"{what} of shape {shape} and dtype {kinds}", got, name)


def _keys(state: Any) -> str:
    return ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__


def _expect(condition: bool, expected: str, got: object, name: str = "optimizer") -> None:
    if not condition:
        raise ValueError(f"state.pt: {name}: expected {expected}, got {got}")
