"""The bench itself: it times nothing that is wrong, lets the contenders take turns, and judges bars as it says."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench():
    """`bench` is not installed. The root is on the path no longer than needed: it has a folder `kernels`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        import bench.cases
        import bench.measure
        import bench.report
    return bench


def square(x):
    return ((x * x).sum(),)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * x).sum()

    @staticmethod
    def backward(ctx, upstream):
        return torch.full((3,), 2.0) * upstream


@pytest.mark.parametrize(
    ("ours", "result"),
    [(lambda x: ((x * x).sum() * (1 + 1e-4),), 0), (lambda x: (WrongGradient.apply(x),), 1)],
    ids=["value", "gradient"],
)
def test_refuses_to_time_a_kernel_that_disagrees(bench, ours, result):
    timed = []
    case = bench.case.Case(
        name="square",
        shape="[3]",
        make_inputs=lambda: (torch.tensor([1.0, 2.0, 3.0]),),
        ours=ours,
        eager=lambda x: timed.append(x.dtype) or square(x),
        differentiable=(0,),
    )
    with pytest.raises(bench.measure.Disagreement, match=f"square: result {result} is off by"):
        bench.measure.measure(case, rounds=3, seconds=0.0)
    assert timed == [torch.float64], "only the truth has run"
    assert bench.measure.measure(dataclasses.replace(case, ours=square), 1, 0.0)["error"]["rlhf_fast"] == 0


def test_every_operation_agrees_with_float64(bench):
    cases = bench.cases.all_cases(quick=True)
    assert {bar.case for bar in bench.report.BARS} <= {case.name for case in cases}
    for case in cases:
        torch.manual_seed(0)
        inputs = case.make_inputs()
        contenders = bench.measure.contenders(dataclasses.replace(case, compiled=False), inputs)
        ours = bench.measure.errors(case, inputs, contenders)["rlhf_fast"]
        assert ours <= (4e-3 if "backward bf16" in case.name else 2e-6), case.name


def test_contenders_take_turns(bench, monkeypatch):
    log = []
    contenders = {
        "a": bench.measure.Contender(lambda: log.append("a"), lambda: log.append("restore a")),
        "b": bench.measure.Contender(lambda: log.append("b")),
    }
    monkeypatch.setattr(bench.measure, "SAMPLE_SECONDS", 0.0)
    samples = bench.measure.take_turns(contenders, rounds=3, seconds=0.0)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    a, b = ["restore a", "a"], ["b"]
    assert log[-9:] == a + b + b + a + a + b


def test_temporary_memory_is_the_peak_of_one_call(bench):
    contender = bench.measure.Contender(lambda: torch.ones(2**23) + torch.ones(2**23))  # three of 32 MiB
    assert abs(bench.measure.temporary_bytes(contender) - 96 * 2**20) < 2**20


def test_bars(bench):
    result = {
        "seconds": {"rlhf_fast": {"median": 2.0}, "eager": {"median": 12.0}, "ceiling": {"median": 1.5}},
        "temporary_bytes": {"rlhf_fast": 50},
        "input_bytes": 1000,
    }
    bar = bench.report.Bar
    assert bar("x", "eager").measured(result) == 6
    assert bar("x", "ceiling").measured(result) == 0.75
    assert bar("x", "memory of the input").measured(result) == 0.05
    assert bar("x", "eager", at_least=6).met(result) and not bar("x", "eager", at_least=6.1).met(result)
    assert bar("x", "memory of the input", at_most=0.05).met(result)
    assert not bar("x", "memory of the input", at_most=0.04).met(result)


def test_spread_shows_a_busy_machine(bench):
    seconds = {"rlhf_fast": {"p20": 1.0, "p80": 1.1}, "eager": {"p20": 2.0, "p80": 5.0}}
    assert bench.report.spread({"seconds": seconds}, ["rlhf_fast"]) == 1.1
    assert bench.report.spread({"seconds": seconds}, ["rlhf_fast", "eager"]) == 2.5


def test_command_line_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "bench", "ops", "--quick", "--only", "whiten", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "x.json").read_text())
    (case,) = run["cases"]
    assert case["name"] == "whiten" and run["machine"]["threads"] >= 1
    assert 0 < case["seconds"]["rlhf_fast"]["p20"] <= case["seconds"]["rlhf_fast"]["median"]
    assert "| whiten | [16, 128] | rlhf_fast |" in (tmp_path / "x.md").read_text()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
