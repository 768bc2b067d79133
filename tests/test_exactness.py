"""The exactness table: its truth is true, ours is within its tolerance, and what is wrong or missing shows as such."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.exactness
import bench.exactness_report
import bench.rivals
import bench.trials
from rlhf_fast.ops import dispatch, reference

ROOT = Path(__file__).resolve().parents[1]
INF = math.inf


@pytest.fixture
def by_name():
    def find(name, trials="logits"):
        trials = bench.trials.logits_trials() if trials == "logits" else bench.trials.hidden_trials()
        return next(trial for trial in trials if trial.name == name)

    return find


def named(family, name):
    return next(each for each in family if each.name == name)


def implementation(function, **fields):
    return bench.rivals.Implementation(name="rlhf_fast", load=lambda: function, **fields)


def test_truth_of_a_row_computed_by_hand():
    inputs = bench.trials.Inputs(
        (torch.tensor([[0.0, math.log(3), -INF]]),), torch.tensor([0]), torch.tensor([2.0]), torch.tensor([4.0])
    )
    truth = bench.exactness.truth(inputs)
    entropy = math.log(4) - 0.75 * math.log(3)  # p = 1/4, 3/4, 0
    assert truth.logprobs.item() == pytest.approx(-math.log(4), abs=1e-7)
    assert truth.entropy.item() == pytest.approx(entropy, abs=1e-7)
    assert truth.logprobs_gradient.tolist() == [pytest.approx([1.5, -1.5, 0], abs=1e-7)]
    of_entropy = -0.25 * (-math.log(4) + entropy)
    assert truth.gradient.tolist() == [pytest.approx([1.5 + 4 * of_entropy, -1.5 - 4 * of_entropy, 0], abs=1e-6)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3, "softcap": 2.0}], ids=["plain", "softcap"])
def test_truth_of_hidden_states_is_autograd_s(options):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((5, 4), (7, 4), (7,)))
    bias[3] = -INF
    ids, by_logprobs, by_entropy = torch.tensor([0, 1, 2, 4, 6]), torch.randn(5), torch.randn(5)
    truth = bench.exactness.truth(
        bench.trials.Inputs((hidden, weight), ids, by_logprobs, by_entropy), bias=bias, **options
    )
    logits = (hidden @ weight.t() + bias).requires_grad_()
    out = reference.token_logprobs(logits, ids, **options)
    (by_logprobs * out.logprobs + by_entropy * out.entropy).sum().backward()
    expected = out.logprobs, out.entropy, torch.where(bias == -INF, 0.0, logits.grad) @ weight
    for x, y in zip((truth.logprobs, truth.entropy, truth.gradient), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_truth_keeps_its_digits_where_the_target_is_far_ahead():
    inputs = bench.trials.Inputs(
        (torch.tensor([[40.0, 0.0]]),), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([0.0])
    )
    truth, p = bench.exactness.truth(inputs), math.exp(-40)
    assert truth.logprobs.item() == pytest.approx(-p, rel=1e-12)
    assert truth.entropy.item() == pytest.approx(41 * p, rel=1e-12)
    assert truth.gradient.tolist() == [pytest.approx([p, -p], rel=1e-12)]


def few_rows(trial, n=3):
    """For Triton's interpreter, in which a row takes its time."""

    def make_inputs():
        inputs, options = trial.make_inputs()
        first, *others = inputs.tensors
        return bench.trials.Inputs((first[:n], *others), *(x[:n] for x in inputs[1:])), options

    return dataclasses.replace(trial, make_inputs=make_inputs)


@pytest.mark.parametrize("inputs", ["logits", "hidden"])
@pytest.mark.parametrize("name", ["rlhf_fast", "rlhf_fast, Triton", "rlhf_fast, CUDA C++"])
def test_ours_is_within_its_tolerance(name, inputs):
    trials = bench.trials.logits_trials() if inputs == "logits" else bench.trials.hidden_trials()
    family = bench.rivals.FROM_LOGITS if inputs == "logits" else bench.rivals.FROM_HIDDEN
    if "Triton" in name:
        trials = [few_rows(trial) for trial in trials]
    results = bench.exactness.measure(trials, [named(family, name)])
    assert bench.exactness.failures(results) == []
    assert all(isinstance(result["errors"][name][x], float) for result in results for x in bench.exactness.QUANTITIES)


@pytest.mark.parametrize("name, backend", [("rlhf_fast, Triton", "triton"), ("rlhf_fast, CUDA C++", "cuda")])
def test_the_back_end_named_is_the_one_that_runs(by_name, monkeypatch, name, backend):
    """Another one would give right numbers too."""
    implementation, calls = named(bench.rivals.FROM_HIDDEN, name), []
    with implementation.within():
        kernel = dispatch.KERNELS[backend]["token_logprobs"]
    monkeypatch.setitem(dispatch.KERNELS[backend], "token_logprobs", lambda *x: calls.append(1) or kernel(*x))
    bench.exactness.errors(by_name("V = 4999", "hidden"), implementation)
    assert calls


def test_what_others_get_wrong_is_found(by_name):
    eager, flash = (named(bench.rivals.FROM_LOGITS, name) for name in ("eager", "flash-attn's formula"))
    one = bench.exactness.errors(by_name("one -inf"), eager)
    assert one["log-prob"] < 1e-5 and one["entropy"] == one["gradient of both"] == "NaN"
    assert bench.exactness.errors(by_name("bf16"), eager)["log-prob"] > 1e-3
    assert bench.exactness.errors(by_name("first 4096 -inf"), flash)["its gradient"] < 1e-5, "less than its block"
    block = bench.exactness.errors(by_name("first 40000 -inf"), flash)
    assert block["log-prob"] == block["its gradient"] == "NaN" and block["entropy"] == "-"
    ahead = bench.exactness.errors(by_name("25 nats ahead"), flash)
    assert ahead["log-prob"] == ahead["its gradient"] == 1 and ahead["gradient at the target"] == "0"


def test_ours_fails_where_it_is_wrong(by_name):
    ours = bench.rivals.FROM_LOGITS[0].load()

    def off(logits, ids):
        logprobs, entropy = ours(logits, ids)
        return logprobs + 1e-4, entropy * math.nan

    (result,) = bench.exactness.measure([by_name("V = 4999")], [implementation(off)])
    assert result["errors"]["rlhf_fast"]["entropy"] == "NaN"
    missed = bench.exactness.failures([result])
    assert [miss.partition(" is off by ")[0] for miss in missed] == [
        f"rlhf_fast: V = 4999: {quantity}" for quantity in ("log-prob", "entropy", "gradient of both")
    ]
    eager = dataclasses.replace(named(bench.rivals.FROM_LOGITS, "eager"), name="rlhf_fast")
    results = bench.exactness.measure([by_name("25 nats ahead")], [eager])
    assert "rlhf_fast: 25 nats ahead: the gradient at the target is 0" in bench.exactness.failures(results)


def test_what_is_missing_or_raises_is_named(by_name):
    def crash(*args, **options):
        raise ZeroDivisionError

    trial, errors = by_name("temperature 0.1"), bench.exactness.errors
    absent = bench.rivals.Implementation(name="x", load=crash, requires=("no_such_module",))
    assert set(errors(trial, absent).values()) == {"not installed"}
    assert set(errors(trial, implementation(crash)).values()) == {"-"}, "it takes no temperature"
    raising = implementation(crash, takes=frozenset({"temperature"}))
    assert set(errors(trial, raising).values()) == {"ZeroDivisionError"}
    assert len(bench.exactness.failures(bench.exactness.measure([trial], [raising]))) == 4
    ours = dataclasses.replace(absent, name="rlhf_fast, Triton")
    assert bench.exactness.failures(bench.exactness.measure([trial], [ours])) == [], "what is not there is not wrong"


def test_tables():
    report = bench.exactness_report
    numbers = 0.0, 2.6e-7, 0.036, 1.0, 2.7e5, "NaN"
    assert [report.brief(x) for x in numbers] == ["0", "3e-7", "0.04", "1", "3e+5", "NaN"]
    errors = {"log-prob": 1e-7, "its gradient": 2e-7, "entropy": "NaN", "gradient of both": 3.0}
    nothing = dict.fromkeys(errors, "not installed")
    result = {"case": "c", "shape": "[1]", "dtype": "float32", "errors": {"us": errors, "them": nothing}}
    assert report.short_rows([result]) == [{"case": "c", "us": "2e-7 / NaN", "them": "not installed"}]
    half = report.short_rows([result | {"dtype": "bfloat16"}])
    assert [(row["case"], row["us"]) for row in half] == [("c, values", "1e-7 / NaN"), ("c, gradients", "2e-7 / 3")]
    assert report.emphasised(report.short_rows([result])) == [
        {"case": "c", "us": "**2e-7 / NaN**", "them": "not installed"}
    ]
    assert [row["us"] for row in report.full_rows([result])] == ["1.0e-7", "2.0e-7", "NaN", "3"]


def test_command_line_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "bench", "exactness", "--only", "all but one", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "x.json").read_text())
    assert run["failures"] == [] and run["machine"]["threads"] >= 1
    for results in run["tables"].values():
        (case,) = results
        assert case["case"] == "all but one -inf" and case["errors"]["rlhf_fast"]["log-prob"] == 0
        assert case["errors"]["eager"]["entropy"] == "NaN"
        assert case["errors"]["rlhf_fast, Triton"]["entropy"] == case["errors"]["rlhf_fast, CUDA C++"]["entropy"] == 0
    assert "| all but one -inf | 0 / 0 | 0 / 0 | 0 / 0 | **0 / NaN** |" in (tmp_path / "x.md").read_text()
