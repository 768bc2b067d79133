"""The functions of docs/recipes.md beside those of verl and OpenRLHF, on random inputs: values and gradients.

    pip download --no-deps verl==0.9.1 openrlhf==0.11.2 -d wheels
    python .ci/check_recipes.py wheels

The libraries are not imported, because they import Ray and DeepSpeed: their functions are cut out of their files.
"""

import ast
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

PAGE = Path(__file__).resolve().parent.parent / "docs/recipes.md"
TOLERANCE = 1e-5
B, T, V = 6, 9, 40


def cut(wheel: zipfile.ZipFile, file: str, *names: str, **known: Any) -> SimpleNamespace:
    """These functions and classes of a file, without their decorators. known: what they call."""
    path = next(name for name in wheel.namelist() if name.endswith(file))
    tree = ast.parse(wheel.read(path).decode())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names]
    for node in found:
        node.decorator_list = []
    types = {"Optional": Optional, "Tuple": tuple, "Any": Any, "ActorConfig": object, "AlgoConfig": int}
    space = {"torch": torch, "F": F, "nn": nn, **types, **known}
    exec(compile(ast.fix_missing_locations(ast.Module(found, [])), path, "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


def recipes() -> list[dict[str, Any]]:
    """What each Python block of the page defines."""
    spaces = []
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        spaces.append({})
        exec(block, spaces[-1])
    return spaces


def check(name: str, ours: Any, theirs: Any, inputs: list[torch.Tensor], trained: int) -> None:
    """Both functions on copies of the inputs; raises where values or gradients of the first `trained` differ."""
    found = []
    for function in (ours, theirs):
        copies = [x.clone() for x in inputs]
        leaves = [x.requires_grad_() for x in copies[:trained]]
        given = [x * 1 for x in leaves] + copies[trained:]  # a function may write over what it is given
        out = function(*given)
        values = [out] if isinstance(out, torch.Tensor) else [x for x in out if isinstance(x, torch.Tensor)]
        gradients = torch.autograd.grad(values[0].sum(), leaves) if trained else ()
        found.append([x.detach().double() for x in (*values, *gradients)])
    worst = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    if not worst <= TOLERANCE:
        sys.exit(f"{name}: expected differences up to {TOLERANCE}, got {worst:.2g}")
    print(f"{name}: {worst:.1e}")


def example() -> dict[str, torch.Tensor]:
    """Random numbers for every argument."""
    torch.manual_seed(0)
    mask = torch.arange(T) < torch.randint(2, T + 1, (B, 1))
    old = -torch.rand(B, T) * 3
    return {
        "logits": torch.randn(B, T, V) * 3,
        "ids": torch.randint(V, (B, T)),
        "old": old,
        "new": old + torch.randn(B, T) * 0.4,
        "advantages": torch.randn(B, T) * 2,
        "mask": mask.float(),
        "values": torch.randn(B, T),
        "rewards": torch.randn(B, T) * mask,
    }


def check_verl(wheel: zipfile.ZipFile, ours: dict[str, Any], x: dict[str, torch.Tensor]) -> None:
    """verl's functions."""
    file = "verl/utils/torch_functional.py"
    gather = cut(wheel, file, "gather_from_labels").gather_from_labels
    names = ("masked_sum", "masked_mean", "masked_var", "masked_whiten", "entropy_from_logits")
    tools = cut(wheel, file, *names, "logprobs_from_logits_v2", gather_from_labels=gather)
    file = "verl/trainer/ppo/core_algos.py"
    losses = cut(wheel, file, "agg_loss", "compute_policy_loss_vanilla", "compute_gae_advantage_return", verl_F=tools)
    check("verl logprobs", ours["logprobs_from_logits"], tools.logprobs_from_logits_v2, [x["logits"], x["ids"]], 1)
    check("verl entropy", ours["entropy_from_logits"], tools.entropy_from_logits, [x["logits"]], 1)
    batches = ({}, {"dp_size": 2, "batch_num_tokens": 70, "global_batch_size": 12})
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
        for batch in batches:
            config = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=1.5)
            config.global_batch_info = batch

            def call(function: Any, mode: str = mode, config: Any = config) -> Any:
                def run(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Any:
                    loss, metrics = function(old, new, advantages, mask, mode, config)
                    return loss, *(torch.tensor(metrics[f"actor/{name}"]) for name in ("pg_clipfrac", "ppo_kl"))

                return run

            pair = (call(f) for f in (ours["compute_policy_loss_vanilla"], losses.compute_policy_loss_vanilla))
            inputs = [x[name] for name in ("new", "old", "advantages", "mask")]
            check(f"verl policy loss, {mode}, {batch or 'one process'}", *pair, inputs, 1)

    def counted(function: Any) -> Any:
        return lambda rewards, values, mask: [y * mask for y in function(rewards, values, mask, 0.99, 0.9)]

    pair = (counted(f) for f in (ours["compute_gae_advantage_return"], losses.compute_gae_advantage_return))
    check("verl GAE", *pair, [x["rewards"], x["values"], x["mask"]], 0)


class Config(SimpleNamespace):
    """A config of verl: attributes, and `get`."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def check_openrlhf(wheel: zipfile.ZipFile, ours: dict[str, Any], x: dict[str, torch.Tensor]) -> None:
    """OpenRLHF's functions."""
    file = "openrlhf/models/utils.py"
    chunks = cut(wheel, file, "_logsumexp_by_chunk")._logsumexp_by_chunk
    tools = cut(wheel, file, "masked_mean", "log_probs_from_logits", _logsumexp_by_chunk=chunks)
    file = "openrlhf/models/loss.py"
    losses = cut(wheel, file, "aggregate_loss", "PolicyLoss", "ValueLoss", masked_mean=tools.masked_mean)
    file = "openrlhf/trainer/ppo_utils/experience_maker.py"
    maker = cut(wheel, file, "get_advantages_and_returns", Tuple=Pair)
    for temperature in (1.0, 0.7):
        pair = (
            lambda logits, ids, f=f, t=temperature: f(logits, ids, t)
            for f in (ours["log_probs_from_logits"], tools.log_probs_from_logits)
        )
        check(f"OpenRLHF log-probs, temperature {temperature}", *pair, [x["logits"], x["ids"]], 1)
    inputs = [x[name] for name in ("new", "old", "advantages", "mask")]
    for whole in ({}, {"dp_size": 2, "batch_num_tokens": 70, "global_batch_size": 12}):
        for dual_clip in (None, 1.5):
            for token_level in (True, False):
                loss = losses.PolicyLoss(0.2, 0.3, dual_clip, token_level)
                pair = (
                    lambda *args, f=f, loss=loss, whole=whole: f(loss, *args, **whole)
                    for f in (ours["policy_loss"], losses.PolicyLoss.forward)
                )
                said = f"dual clip {dual_clip}, {'tokens' if token_level else 'rows'}, {whole or 'one process'}"
                check(f"OpenRLHF policy loss, {said}", *pair, inputs, 1)
        loss = losses.ValueLoss(0.2)
        pair = (
            lambda *args, f=f, loss=loss, whole=whole: f(loss, *args, **whole)
            for f in (ours["value_loss"], losses.ValueLoss.forward)
        )
        check("OpenRLHF value loss", *pair, [x["values"], x["values"] + 0.3, x["rewards"], x["mask"]], 1)

    def advantages(function: Any) -> Any:
        return lambda values, rewards, mask: function(None, values, rewards, mask, 0.99, 0.9)

    pair = (advantages(f) for f in (ours["get_advantages_and_returns"], maker.get_advantages_and_returns))
    check("OpenRLHF advantages", *pair, [x["values"] * x["mask"], x["rewards"], x["mask"]], 0)


class Pair:
    """A type in an annotation."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls


def main() -> None:
    """Check both libraries' functions."""
    verl, openrlhf = recipes()
    directory = Path(sys.argv[1])
    for pattern, run, ours in (("verl-*", check_verl, verl), ("openrlhf-*", check_openrlhf, openrlhf)):
        (path,) = directory.glob(f"{pattern}.whl")
        with zipfile.ZipFile(path) as wheel:
            print(path.name)
            run(wheel, ours, example())


if __name__ == "__main__":
    main()
