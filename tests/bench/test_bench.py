"""The bench itself: it times nothing that is wrong, lets the contenders take turns, and judges bars as it says."""

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationMixin

import bench.cases
import bench.measure
import bench.report
import bench.rollout
import rlhf_fast
from rlhf_fast.lab.world import build_tokenizer, prompt_rows

ROOT = Path(__file__).resolve().parents[2]


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
def test_refuses_to_time_a_kernel_that_disagrees(ours, result):
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
        bench.measure.measure(case, rounds=3, seconds=0.0, device=bench.device.CPU())
    assert timed == [torch.float64], "only the truth has run"
    assert (
        bench.measure.measure(dataclasses.replace(case, ours=square), 1, 0.0, bench.device.CPU())["error"]["rlhf_fast"]
        == 0
    )


@pytest.mark.parametrize(("off", "refused"), [(2**-9, False), (2**-7, True)])
def test_a_bf16_gradient_out_of_matmuls_has_the_error_of_its_norm(off, refused):
    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return (x @ weight.t()).float().sum()

        @staticmethod
        def backward(ctx, upstream):
            (weight,) = ctx.saved_tensors
            exact = weight.double().sum(0).expand(2, -1).clone()
            exact[0, 0] += off * exact.norm()  # one entry has all of the error
            return exact.bfloat16(), None

    case = bench.case.Case(
        name="product",
        shape="[2, 3] x [4, 3]",
        make_inputs=lambda: (torch.ones(2, 3).bfloat16(), torch.full((4, 3), 0.25).bfloat16()),
        ours=lambda x, weight: (Gradient.apply(x, weight),),
        eager=lambda x, weight: ((x @ weight.t()).float().sum(),),
        products=3,
        differentiable=(0,),
    )
    inputs = case.make_inputs()
    contenders = bench.measure.contenders(case, inputs)
    if refused:
        with pytest.raises(bench.measure.Disagreement, match="product: result 1 is off by"):
            bench.measure.errors(case, inputs, contenders)
    else:
        assert bench.measure.errors(case, inputs, contenders)["rlhf_fast"] <= 2**-8


def test_every_operation_agrees_with_float64(monkeypatch):
    cases = bench.cases.all_cases(quick=True)
    monkeypatch.setattr(bench.cases, "bf16_unit", lambda: 2)  # the bars of AVX-512 machines are about bf16 too
    for bars, device in (
        (bench.report.AVX2_BARS, "cpu"),
        (bench.report.AVX512_BARS, "cpu"),
        (bench.report.GPU_BARS, "cuda"),
    ):
        assert {bar.case for bar in bars} <= {case.name for case in bench.cases.all_cases(quick=True, device=device)}
    for case in cases:
        torch.manual_seed(0)
        inputs = case.make_inputs()
        contenders = bench.measure.contenders(dataclasses.replace(case, compiled=False), inputs)
        ours = bench.measure.errors(case, inputs, contenders)["rlhf_fast"]
        rounded = "bf16" in case.name and "backward" in case.name
        assert ours <= (4e-3 if rounded else 2e-6), case.name


def test_bars_belong_to_the_kind_of_machine():
    of = bench.report.bars_of
    assert of("cpu", "avx512") is bench.report.AVX512_BARS and of("cpu", "avx2") is bench.report.AVX2_BARS
    assert of("cuda", "avx512") is bench.report.GPU_BARS
    strict = {(bar.case, bar.against): bar.at_least for bar in bench.report.AVX512_BARS}
    for bar in bench.report.AVX2_BARS:
        assert strict[bar.case, bar.against] >= bar.at_least


def test_libraries_take_part_where_installed(monkeypatch):
    """A library's log-probs become each case's first result, and gradients, as the others have them."""
    import bench.libraries as libraries

    here = {"requires": ("torch",)}
    for family, ours in (("FROM_LOGITS", rlhf_fast.token_logprobs), ("FROM_HIDDEN", rlhf_fast.linear_token_logprobs)):
        rows = [
            libraries.Implementation(name="a library", load=lambda f=ours: f, **here),
            libraries.Implementation(name="absent", load=lambda: 1 / 0, requires=("no_such_library",)),
        ]
        monkeypatch.setattr(libraries, family, rows)
    cases = libraries.with_libraries(bench.cases.all_cases(quick=True, device="cuda"))
    assert [c.name for c in cases if "a library" in c.others] == [
        "token_logprobs forward bf16",
        "token_logprobs forward + backward bf16",
        "token_logprobs forward + in-place backward bf16",
        "linear_sft_loss forward + backward",
        "linear_token_logprobs forward + backward",
    ]
    for case in cases:
        if "a library" in case.others:
            competitors = bench.measure.contenders(
                dataclasses.replace(case, compiled=False), inputs := case.make_inputs()
            )
            assert bench.measure.errors(case, inputs, competitors)["a library"] <= 2**-8


def test_contenders_take_turns():
    log = []
    contenders = {
        "a": bench.device.Contender(lambda: log.append("a"), lambda: log.append("restore a")),
        "b": bench.device.Contender(lambda: log.append("b")),
    }
    device = bench.device.CPU()
    device.sample_seconds = 0.0
    samples = bench.measure.take_turns(contenders, rounds=3, seconds=0.0, device=device)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    a, b = ["restore a", "a"], ["b"]
    assert log[-9:] == a + b + b + a + a + b


def test_temporary_memory_is_the_peak_of_one_call():
    contender = bench.device.Contender(lambda: torch.ones(2**23) + torch.ones(2**23))  # three of 32 MiB
    assert abs(bench.device.CPU().temporary_bytes(contender) - 96 * 2**20) < 2**20


def test_bars():
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


def test_spread_shows_a_busy_machine():
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


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, capsys):
    import bench.__main__ as command

    monkeypatch.setattr(sys, "argv", ["bench", "ops", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2 and "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_rollout_bars_are_ratios_of_medians():
    rollout = bench.rollout
    seconds = {rollout.SAMPLED: 2.0, rollout.FOLDED: 2.4, rollout.THEIRS: 5.1, rollout.THEIRS_BOTH: 9.1}
    times = {name: {"median": x} for name, x in seconds.items()}
    slower = {name: {"median": 3 * x} for name, x in seconds.items()}
    results = [{"seconds": times, "precision": "bfloat16"}, {"seconds": slower, "precision": "float32"}]
    rows = rollout.bar_rows(results, rollout.bars("cpu"))
    assert [row["measured"] for row in rows] == pytest.approx([5.1 / 2, 9.1 / 2.4, 2 / 2.4])
    assert [row["met"] for row in rows] == ["yes", "yes", "yes"]
    (row,) = rollout.bar_rows(results, [rollout.Bar(rollout.SAMPLED, rollout.SAMPLED, 1.5, 0, 1)])
    assert row["measured"] == pytest.approx(3) and row["against"].endswith("float32")
    times[rollout.SAMPLED]["median"] = 2.1
    assert [row["met"] for row in rollout.bar_rows(results, rollout.bars("cpu"))] == ["NO", "yes", "yes"]


def test_a_decode_that_differs_from_generate_is_not_timed(monkeypatch):
    shape = bench.rollout.shapes("cpu", quick=True)[0]
    original = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda *args, **kwargs: original(*args, **kwargs).flip(0))
    with pytest.raises(bench.measure.Disagreement, match="greedy tokens differ from generate's"):
        bench.rollout.measure({shape: bench.rollout.untrained(shape, "cpu")}, 1, 0.0, bench.device.CPU())


def test_a_checkpoint_decodes_in_three_precisions_by_turns(tmp_path, capsys, monkeypatch):
    import bench.__main__ as command

    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    shape = bench.rollout.shapes("cpu", quick=True)[0]
    bench.rollout.untrained(shape, "cpu").model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompt_rows(3, seed=0)]
    with gzip.open(tmp_path / "prompts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    out = tmp_path / "out.json"
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--quick", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench", "rollout", *options])
    assert command.main() == 0
    record = json.loads(out.read_text())
    precisions = [result["precision"] for result in record["results"]]
    assert precisions == ["float32", "float32 under bf16 autocast", "bfloat16"]
    assert [result["rounds"] for result in record["results"]] == [2, 2, 2]
    assert record["results"][0]["logprob_drift"] < 1e-4 and record["bars"] == []
    table = bench.rollout.bar_rows(record["results"], bench.rollout.checkpoint_bars())
    assert [row["bar"] for row in table] == [">= 1.3", ">= 1.67"] * 3 + [">= 1.5"]
