"""Whole steps: the groups add up, the matmuls are counted as the formula says, and bars are judged as it says."""

import argparse
import json
import time

import pytest
import torch
from torch.profiler import record_function

from bench.steps import cases, command, floor, products, report, trace, training
from bench.steps.products import Attention, Product
from bench.steps.trace import ATTENTION, HEAD, HEAD_MATMUL, LAYERS, MATMUL, OPTIMIZER, PYTHON, Event
from bench.steps.watch import Profile


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return cases.untrained("toy", cases.TOY, cases.AT_TOY, tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="module")
def step(models, tmp_path_factory):
    """An SFT step of a toy: what JSON keeps, and the matmuls."""
    options = models.options("sft", len(training.kinds(1)), bf16=False)
    return training.measure("sft", options, 1, tmp_path_factory.mktemp("sft"))


def test_the_groups_of_a_step_add_up_to_its_time(step):
    result, _ = step
    profile = result["profile"]
    assert sum(profile["groups"].values()) == pytest.approx(profile["seconds"], rel=1e-6)
    assert all(seconds >= -1e-6 for seconds in profile["groups"].values())
    busy = profile["cpu_seconds"] + profile["waiting"]
    assert profile["seconds"] - 0.5 < busy / profile["threads"] <= profile["seconds"], "clocks inside the window"
    for group in (MATMUL, ATTENTION, LAYERS, HEAD_MATMUL, HEAD, OPTIMIZER, PYTHON):
        assert profile["groups"][group] > 0, group
    assert result["optimizer"]["seconds"] <= profile["groups"][OPTIMIZER]


def test_the_matmuls_of_a_step_are_those_of_the_formula(models, step):
    """Flops of a step from the config: 6 for each weight and token of the layers, and of the head by trained tokens."""
    _, counts = step
    policy, rows = cases.TOY.policy, models.sizes.batch["sft"]
    H, layers, ffn = policy["hidden_size"], policy["num_hidden_layers"], policy["intermediate_size"]
    tokens = rows * (models.sizes.length - 1)  # the last token of a row predicts nothing
    trained = rows * (models.sizes.length // 2)
    flops = {
        group: sum(2 * p.batch * p.m * p.k * p.n * times for p, times in found.items())
        for group, found in counts.items()
    }
    assert flops[MATMUL] == 6 * tokens * layers * (4 * H * H + 3 * H * ffn)
    assert flops[HEAD_MATMUL] == 6 * trained * H * cases.TOY.vocabulary
    n = models.sizes.length - 1
    assert flops[ATTENTION] == pytest.approx(7 * rows * layers * H * n * (n + 1))
    assert all(p.dtype == "float32" for found in counts.values() for p in found)


def test_attention_by_formula():
    call = Attention((3, 2), (3, 2), 4, 2, 8, "bfloat16", backward=False)
    assert dict(products.of_attention(call)) == {
        Product(4, 3, 8, 3, False, True, "bfloat16"): 4 / 6,
        Product(4, 3, 3, 8, False, False, "bfloat16"): 4 / 6,
        Product(4, 2, 8, 2, False, True, "bfloat16"): 3 / 4,
        Product(4, 2, 2, 8, False, False, "bfloat16"): 3 / 4,
    }
    (by_keys,) = [p for p, _ in products.of_attention(call._replace(queries=(3,), keys=(3,), backward=True)) if p.left]
    assert by_keys == Product(4, 3, 3, 8, True, False, "bfloat16")
    decoding = Attention((1, 1), (10, 6), 4, 2, 8, "float32", backward=False)
    assert dict(products.of_attention(decoding)) == {
        Product(4, 2, 8, 10, False, True, "float32"): 0.8,
        Product(4, 2, 10, 8, False, False, "float32"): 0.8,
    }


def test_self_times_and_groups():
    inner = [Event("aten::mm", 1.0, 2.0), Event("aten::copy_", 3.5, 0.5), Event("aten::relu", 6.0, 1.0)]
    outer = [Event(trace.WINDOW, 0.0, 10.0), Event("aten::linear", 0.5, 4.0), Event("rlhf_fast::swiglu", 5.5, 3.0)]
    (window,) = trace.trees([*inner, *outer])
    seconds = {group: value for group, value in trace.seconds(window).items() if value}
    assert seconds == {MATMUL: 2.0, trace.COPIES: 0.5, LAYERS: 3.0, trace.OTHER: 1.5, PYTHON: 3.0}
    head = Event("rlhf_fast::linear_ppo_loss", 0.0, 4.0, inside=[Event("aten::addmm", 1.0, 3.0)])
    assert {g: s for g, s in trace.seconds(head).items() if s} == {HEAD: 1.0, HEAD_MATMUL: 3.0}


def test_under_autocast_the_operator_that_multiplies_counts(tmp_path):
    profile = Profile(tmp_path / "trace.json")
    x, w = torch.randn(5, 3), torch.randn(3, 7)
    profile.begin()
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        x @ w
    with record_function("bench: sampling"):
        time.sleep(0.01)
    elapsed = time.perf_counter() - begun
    window = profile.end()
    assert products.count(window, [])[MATMUL] == {Product(1, 5, 3, 7, False, False, "bfloat16"): 1.0}
    assert elapsed <= window.seconds < elapsed + 0.5
    assert trace.seconds(window)[trace.SAMPLING] >= 0.01


def test_a_floor_is_the_sum_of_matmuls_alone(monkeypatch):
    a, b = Product(1, 2, 3, 4, False, True, "float32"), Product(2, 2, 3, 4, True, False, "bfloat16")
    monkeypatch.setattr(floor, "time_alone", lambda product, times, seconds: {a: (0.5, 1.0), b: (0.25, 0.5)}[product])
    found = floor.floor({MATMUL: {a: 3.0}, ATTENTION: {a: 1.0, b: 2.0}}, 0.0)
    assert (found["seconds"], found["cpu_seconds"]) == (2.5, 5.0)
    assert found["groups"] == {MATMUL: 1.5, ATTENTION: 1.0}
    assert [row["times"] for row in found["products"]] == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "product", [Product(1, 2, 3, 4, True, True, "float32"), Product(2, 5, 3, 4, False, True, "bfloat16")]
)
def test_operands_lie_as_they_do_in_the_step(product):
    a, b, out = floor._operands(product)
    assert torch.allclose(torch.matmul(a, b).float(), torch.tensor(product.k * 1e-4), rtol=1e-2)
    assert (a.stride(-1) != 1, b.stride(-1) != 1) == (product.left, product.right)
    assert out.shape[-2:] == (product.m, product.n)
    assert min(floor.time_alone(product, 3.0, 0.0)) > 0


def result(step, seconds):
    return {"model": "m", "step": step, "dtype": "fp32", "seconds": {"median": seconds}, "floor": {"seconds": 1.0}}


def test_bars():
    steps = [("sft", 1.35), ("sft", 1.36), ("prefill", 1.2), ("prefill", 1.21), ("decode", 1.4), ("decode", 1.41)]
    assert [row["met"] for row in report.bar_rows([result(*x) for x in steps])] == ["yes", "NO"] * 3
    assert report.bar_rows([result("ppo", 1.3)])[0]["step"] == "m, PPO, fp32"


def test_every_step_runs_and_is_written(tmp_path, monkeypatch):
    out = tmp_path / "steps.json"
    args = argparse.Namespace(
        only="", dtypes=["bf16"], quick=True, check=False, rounds=1, model=None, data=None, out=out
    )
    monkeypatch.setattr("sys.argv", ["bench", "steps"])
    assert command.run(args) == 0
    results = json.loads(out.read_text())["results"]
    assert [x["step"] for x in results] == ["sft", "dpo", "ppo", "remax", "prefill", "decode"]
    assert [bool(x["profile"]["groups"]["sampling"]) for x in results] == [False, False, True, True, False, True]
    assert all(x["floor"]["groups"][ATTENTION] > 0 for x in results)
    assert {p["dtype"] for p in results[0]["floor"]["products"] if p["group"] == MATMUL} == {"bfloat16"}
    assert results[2]["optimizer"]["weights"] == 2 * results[3]["optimizer"]["weights"] + 32, "the value model's head"
    page = out.with_suffix(".md").read_text()
    assert "| toy, decode step, bf16 |" in page and "## The optimizer beside memory" in page
    with pytest.raises(SystemExit, match="no step contains 'kto'"):
        command.run(argparse.Namespace(**{**vars(args), "only": "kto"}))
