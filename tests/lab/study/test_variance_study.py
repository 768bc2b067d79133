"""The variance study: all estimators against plain autograd, offsets, the command and its resumption, the bandit."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml

from rlhf_fast import cli
from rlhf_fast.lab.study import runs, two_armed
from rlhf_fast.lab.study.config import VarianceStudyConfig
from rlhf_fast.lab.study.start import pipeline_of
from rlhf_fast.lab.study.variance import summary
from rlhf_fast.lab.study.variance_seed import METHODS, PANELS, SeedRun, offsets, rounds_of
from rlhf_fast.lm.passes import response_logits, token_values
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.metrics import read_metrics
from tests.support.stages import REWARD


@pytest.fixture(scope="module")
def pipeline_file(files, tiny_model, tmp_path_factory):
    """SFT, reward model and ReMax in a few steps."""
    lengths = {"max_prompt_length": 16, "max_response_length": 6}
    values = {
        "model": tiny_model,
        "output_dir": "unused",
        "methods": ["remax"],
        "sft": {"train_data": files["sft"], "batch_size": 16, "max_length": 48},
        "reward": {"train_data": files["pairs"], "batch_size": 16, "normalize_samples": 8, **lengths},
        "common": {"train_data": files["prompts"], "eval_data": files["prompts"], "eval_steps": 1, "steps": 4,
                   "batch_size": 8, "kl_coef": 0.3, "learning_rate": 1e-3, "eval_reward": REWARD, **lengths},
        "ppo": {"epochs": 4, "minibatches": 2, "value_learning_rate": 3e-3},
        "rloo": {"group_size": 2},
    }  # fmt: skip
    file = tmp_path_factory.mktemp("variance") / "pipeline.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def command(pipeline_file, tmp_path_factory):
    """Flags of the command, which has run once, in this process: to start another takes longer than the run."""
    out = tmp_path_factory.mktemp("out")
    flags = ["--out", str(out), "--pipeline", str(pipeline_file), "--seeds", "2", "--policies", "3", "--batches", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_pool", lambda workers: ThreadPoolExecutor(1))
        assert cli.main(["study", "variance", *flags]) == 0
    return out, flags


def test_command_writes_every_figure(command):
    out, _ = command
    record = json.loads((out / "variance.json").read_text())
    assert record["rounds"] == [0, 2, 4] and record["completions"] == 8
    assert list(record["panels"]) == [*PANELS]
    for methods in record["panels"].values():
        assert list(methods) == [*METHODS]
        for figures in methods.values():
            assert all(v > 0 and math.isfinite(v) for v in figures["norm"]["mean"] + figures["variance"]["mean"])
    assert len(record["eval/reward"]["mean"]) == 3
    assert {p.name for p in out.glob("*.png")} == {"variance.png", "two_armed.png"}
    rows = [row for row in read_metrics(out / "seed-0" / "variance" / "metrics.jsonl") if row["step"]]
    assert rows[-1]["loss/value constant"] < 0.7 * rows[0]["loss/value constant"]  # of an offset of -3.5 at first


def test_a_measured_seed_is_kept_and_other_settings_are_refused(command, capsys):
    out, flags = command
    file = out / "seed-0" / "variance" / "measured.json"
    record = json.loads(file.read_text())
    record["points"][0]["panels"]["plain"]["ReMax"]["norm"] = 123.0
    file.write_text(json.dumps(record))
    assert cli.main(["study", "variance", *flags]) == 0
    kept = json.loads((out / "variance.json").read_text())["seeds"]
    assert kept[0]["points"][0]["panels"]["plain"]["ReMax"]["norm"] == 123.0
    assert cli.main(["study", "variance", *flags[:-1], "3"]) == 1
    assert "was made with batches=2, and this study has 3" in capsys.readouterr().err


def test_all_estimators_by_plain_autograd(command):
    """Three kinds of score, five baselines: gradients from logits, with weights written out by hand."""
    out, flags = command
    config = VarianceStudyConfig(out=str(out), pipeline=flags[3], policies=2, batches=3)
    seed = SeedRun(pipeline_of(config.pipeline, out, 0), config)
    online, grouped = seed.online, seed.grouped
    with torch.no_grad():  # a policy that is not the reference, so that the KL penalty is there
        for p in online.learner.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    seed.measure()
    tables = offsets(online.policy.config.vocab_size, online.device)
    gradients = {(panel, method): [] for panel in PANELS for method in METHODS}
    for i in range(3):
        first = online.config.steps + 1 + i
        for run, step, methods in (
            (online, first, [m for m in METHODS if m != "RLOO"]),
            (grouped, first + 3, ["RLOO"]),
        ):
            e = run.collect(Meter("cpu"), step)
            mask = e.rollout.response_mask
            kl = 0.3 * (e.rollout.logprobs - e.ref_logprobs)
            for panel, method in ((p, m) for p in PANELS for m in methods):
                offset = tables[panel][e.rollout.prompt_ids[:, -1]]
                scores = e.scores + offset
                if method == "REINFORCE":
                    baseline = 0.0 * kl
                elif method == "batch mean":
                    baseline = ((scores.sum() - scores) / 7)[:, None]
                elif method == "ReMax":
                    baseline = (e.greedy_scores + offset)[:, None]
                elif method == "RLOO":
                    baseline = scores.view(4, 2).flip(1).reshape(8, 1)  # the other one of two
                else:
                    baseline = token_values(seed.critics[panel].model, e.rollout.sequences).detach()
                logits = response_logits(online.policy, e.rollout.sequences).double()
                chosen = logits.log_softmax(-1).gather(-1, e.rollout.response_ids[..., None])[..., 0]
                weighted = torch.where(mask, chosen * (scores[:, None] - baseline - kl).double(), 0.0)
                gradient = torch.autograd.grad(-weighted.sum(1).mean(), online.learner.parameters)
                gradients[panel, method].append(torch.cat([g.flatten() for g in gradient]).double())
    for (panel, method), vectors in gradients.items():
        got, stacked = seed.points[0]["panels"][panel][method], torch.stack(vectors)
        assert got["variance"] == pytest.approx(stacked.var(dim=0).sum().item(), rel=2e-3), (panel, method)
        assert got["norm"] == pytest.approx(stacked.norm(dim=1).mean().item(), rel=1e-3), (panel, method)


def test_summary_over_two_seeds_by_hand():
    def seed(reinforce, remax):
        figures = {m: {"norm": 1.0, "variance": reinforce} for m in METHODS}
        figures["ReMax"] = {"norm": 2.0, "variance": remax}
        return [{"rounds": 0, "eval/reward": reinforce, "panels": {panel: figures for panel in PANELS}}]

    got = summary([seed(4.0, 2.0), seed(8.0, 1.0)])
    assert got["rounds"] == [0] and "eval/kl" not in got
    assert got["eval/reward"] == {"mean": [6.0], "se": [2.0]}
    remax = got["panels"]["by prompt"]["ReMax"]
    assert remax["variance"] == {"mean": [1.5], "se": [0.5]}
    assert remax["variance at equal decoding"] == {"mean": [3.0], "se": [1.0]}
    assert remax["over REINFORCE"]["mean"] == [0.3125]
    assert remax["over REINFORCE"]["se"] == pytest.approx([0.1875])
    assert got["panels"]["plain"]["REINFORCE"]["variance at equal decoding"]["mean"] == [6.0]


def test_places_and_offsets():
    assert rounds_of(8, 60) == [0, 9, 17, 26, 34, 43, 51, 60]
    assert rounds_of(8, 3) == [0, 1, 2, 3]
    assert rounds_of(2, 100) == [0, 100]
    tables = offsets(10_000, torch.device("cpu"))
    assert (tables["plain"] == 0).all() and (tables["constant"] == -3.5).all()
    low, high, mean = (getattr(tables["by prompt"], name)().item() for name in ("min", "max", "mean"))
    assert -14 <= low < -13.9 and 6.9 < high <= 7 and mean == pytest.approx(-3.5, abs=0.2)


def test_bandits_stand_on_both_sides_of_the_crossover():
    cases = two_armed.bandits()
    assert [case["crossover"] for case in cases] == [1.0, 0.75, pytest.approx(1 / 1.8)]
    for case in cases:
        curves = case["variance"]
        assert set(curves) == {"REINFORCE", "ReMax", "RLOO, k = 2", "RLOO, k = 3", "RLOO, k = 4", "value model"}
        for p, plain, greedy in zip(case["p"], curves["REINFORCE"], curves["ReMax"], strict=True):
            if 0 < p < 1 and p != case["crossover"]:
                assert (greedy < plain) == (p < case["crossover"])
    row = next(row for row in two_armed.table() if row["r1, r2"] == "3, 1" and row["p"] == "0.8")
    assert (row["REINFORCE"], row["ReMax"], row["ReMax against REINFORCE"]) == ("0.31360", "0.40960", "HIGHER")


@pytest.mark.parametrize("flag, message", [("--policies=1", "policies: expected an integer >= 2"),
                                           ("--batches=1", "batches: expected an integer >= 2")])  # fmt: skip
def test_bad_config(flag, message, capsys):
    assert cli.main(["study", "variance", flag]) == 2
    assert re.search(message, capsys.readouterr().err)
