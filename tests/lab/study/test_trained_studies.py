"""The studies of trained models: their cells, resumption, wins by hand, best-of-N by enumeration, whole commands."""

import dataclasses
import itertools
import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_fast import cli
from rlhf_fast.config import DPOConfig, PPOConfig
from rlhf_fast.data.encoding import encode_prompts, load_rows
from rlhf_fast.data.rows import write_rows
from rlhf_fast.lab import world
from rlhf_fast.lab.study import best_of, convergence, frontier, judge, runs, shift, temperature, unlikelihood, winrate
from rlhf_fast.lab.study.config import (
    ConvergenceConfig,
    FrontierConfig,
    ShiftConfig,
    TemperatureConfig,
    TrainedStudyConfig,
    WinRateConfig,
)
from rlhf_fast.lab.study.judge import ROWS, SFT, Judged
from rlhf_fast.lab.study.methods import MAIN, ONLINE, STRENGTHS, cells_of, given_true_reward
from rlhf_fast.lab.study.sampling import sample_scores
from rlhf_fast.lab.study.start import pipeline_of
from rlhf_fast.lab.study.unlikelihood import UnlikelihoodConfig
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.rewards import Reward

REWARD = "rlhf_fast.world:true_reward"
SMALL = {"PPO": (3.0,), "ReMax": (1.0, 3.0), "DPO": (0.3,), "Preferred-FT": (None,), "Best-of-N": (None,)}


@pytest.fixture(scope="module")
def studied(tiny_model, tmp_path_factory):
    """(directory, flags) of a study of a tiny pipeline, whose studies run one after the other in the same directory."""
    directory = tmp_path_factory.mktemp("study")
    data = directory / "data"
    rows = world.prompt_rows(24, seed=1, completions=True)
    write_rows(data / "sft.jsonl", world.sft_rows(48, seed=0))
    write_rows(data / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_rows(data / "eval.jsonl", rows[:6])
    write_rows(data / "shifted.jsonl", world.prompt_rows(9, seed=4, completions=True, style=world.SHIFTED))
    lengths = {"max_prompt_length": 16, "max_response_length": 8}
    prompts = {"train_data": str(data / "prompts.jsonl"), "eval_data": str(data / "eval.jsonl"), "eval_reward": REWARD}
    pipeline = {
        "model": tiny_model,
        "output_dir": "unused",
        "sft": {"train_data": str(data / "sft.jsonl"), "batch_size": 16, "max_length": 48, "learning_rate": 3e-3},
        "pairs": {"prompts": prompts["train_data"], "reward": REWARD, "scale": 20, **lengths},
        "reward": {"batch_size": 8, "normalize_samples": 8, "max_length": 48, **lengths},
        "common": {"steps": 2, "batch_size": 8, "kl_coef": 0.1, "learning_rate": 1e-3, **prompts, **lengths},
        "dpo": {"max_length": 48},
    }
    (directory / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    flags = ["--pipeline", str(directory / "pipeline.yaml"), "--seeds", "2", "--workers", "1"]
    return directory, [*flags, "--out", str(directory / "out")]


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, where starting another takes longer than the run itself; returns what ran."""
    ran = []

    def pool(workers):
        ran.append(workers)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(runs, "_pool", pool)
    monkeypatch.setattr(frontier, "STRENGTHS", SMALL)
    for module in (frontier, winrate, temperature, convergence, shift):
        monkeypatch.setattr(module, "MAIN", {name: strengths[-1:] for name, strengths in SMALL.items()})
    return ran


def record_of(studied, name, *more):
    directory, flags = studied
    assert cli.main(["study", name, *flags, *more]) == 0
    assert (directory / "out" / f"{name}.png").stat().st_size > 10_000
    return json.loads((directory / "out" / f"{name}.json").read_text())


def test_frontier(studied, here, capsys):
    record = record_of(studied, "frontier", "--kl-to", "2")
    out = capsys.readouterr().out
    assert "[12/12]" in out and "gain over DPO" in out and "2 seeds" in out
    assert len(here) == 2  # starts, cells
    assert list(record["methods"]) == list(SMALL)
    assert len(record["runs"]) == 2 * sum(map(len, SMALL.values()))
    remax = [run for run in record["runs"] if run["method"] == "ReMax"]
    assert [(run["strength"], run["seed"]) for run in remax] == [(1.0, 0), (3.0, 0), (1.0, 1), (3.0, 1)]
    seed = studied[0] / "out" / "seed-1"
    metrics = read_metrics(seed / "remax-3" / "metrics.jsonl")
    assert remax[-1]["points"] == [[m["step"], m["eval/kl"], m["eval/reward"]] for m in metrics]
    assert [point[0] for point in remax[-1]["points"]] == [0, 1, 2]
    # every seed has a start of its own, all methods the same
    starts = {(run["seed"], run["points"][0][2]) for run in record["runs"] if run["method"] != "Best-of-N"}
    assert len(starts) == 2
    config = json.loads((seed / "remax-3" / "run.json").read_text())["config"]
    assert (config["kl_target"], config["kl_horizon"], config["seed"]) == (3.0, 16.0, 1)
    # by hand: the envelope at the largest KL is the best of all points, PPO's gain over DPO the mean of differences
    best = {
        (run["method"], run["seed"]): max(r for _, kl, r in run["points"] if kl <= 2) for run in record["runs"]
    }  # the last strength's
    end = record["methods"]["PPO"]["envelope"]["mean"][-1]
    assert end == pytest.approx((best["PPO", 0] + best["PPO", 1]) / 2)
    gain = record["methods"]["PPO"]["gain_over_dpo"]
    assert gain["mean"] == pytest.approx(statistics.fmean(gain["seeds"]))
    assert gain["se"] == pytest.approx(abs(gain["seeds"][0] - gain["seeds"][1]) / 2)

    again = record_of(studied, "frontier", "--kl-to", "2")
    assert len(here) == 2  # nothing ran again
    assert again["methods"] == record["methods"]
    some = record_of(studied, "frontier", "--kl-to", "2", "--methods", "PPO", "Best-of-N")
    assert some["methods"]["PPO"]["envelope"] == record["methods"]["PPO"]["envelope"]
    assert list(some["methods"]) == ["PPO", "Best-of-N"] and "gain_over_dpo" not in some["methods"]["PPO"]
    main = record_of(studied, "frontier", "--kl-to", "2", "--strengths", "main")
    assert [(run["method"], run["strength"]) for run in main["runs"] if run["seed"] == 0] == [
        (method, strengths[-1]) for method, strengths in SMALL.items()
    ]
    assert main["methods"]["PPO"] == record["methods"]["PPO"]  # of which there is one strength only
    assert cli.main(["study", "frontier", *studied[1], "--methods", "ppo"]) == 1
    assert "methods: expected some of PPO, ReMax, DPO, Preferred-FT, Best-of-N, got 'ppo'" in capsys.readouterr().err


def test_winrate(studied, here):
    record = record_of(studied, "winrate")
    assert set(record["methods"]) == {"PPO", "ReMax", "DPO", "Preferred-FT", SFT, "Best-of-16", ROWS}
    assert record["methods"] == sorted(record["methods"], key=lambda name: -record["rewards"][name]["mean"])
    for a, b in itertools.permutations(record["methods"], 2):
        assert record["win_rate"][a][b]["mean"] + record["win_rate"][b][a]["mean"] == pytest.approx(1)
    rewards = json.loads((studied[0] / "out/seed-0/dpo-0.3/judged-eval-1.json").read_text())["rewards"]
    rows = load_rows(studied[0] / "data" / "eval.jsonl", "prompt")
    own = world.true_reward([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert record["rewards"][ROWS] == {"mean": pytest.approx(statistics.fmean(own)), "se": 0.0}
    assert len(rewards) == len(own) == 6


def test_wins_by_hand():
    rewards = {("A", 0): [1.0, 0.0], ("B", 0): [0.0, 0.0], ("A", 1): [1.0, 1.0], ("B", 1): [0.0, 0.0]}
    result = winrate.matrix(Judged({key: torch.tensor(value) for key, value in rewards.items()}))
    assert result["methods"] == ["A", "B"]
    assert result["win_rate"]["A"]["B"] == {"mean": 0.875, "se": pytest.approx(0.125)}  # 3/4 and 1
    figures = shift._figures(
        {key: torch.tensor(value) for key, value in rewards.items()} | {(ROWS, s): torch.ones(2) for s in (0, 1)}
        | {(SFT, s): torch.zeros(2) for s in (0, 1)}, "A", [0, 1],
    )  # fmt: skip
    assert figures["gain_over_sft"] == {"mean": 0.75, "se": pytest.approx(0.25)}
    assert figures["wins_over_rows"]["mean"] == (0.25 + 0.5) / 2


def test_temperature(studied, here):
    record = record_of(studied, "temperature", "--temperatures", "0", "1")
    assert set(record["methods"]) == {"PPO", "ReMax", "DPO", "Preferred-FT", SFT, "Best-of-16"}
    for rates in record["methods"].values():
        assert list(rates) == ["0", "1"]
        assert all(0 <= rate["mean"] <= 1 for rate in rates.values())
    # the likeliest tokens of the SFT model are Best-of-N's only completion at temperature 0
    assert record["methods"]["Best-of-16"]["0"] == record["methods"][SFT]["0"]


def test_convergence(studied, here):
    record = record_of(studied, "convergence")
    curve = record["methods"]["DPO"]
    histories = [read_metrics(studied[0] / f"out/seed-{seed}/dpo-0.3/metrics.jsonl") for seed in (0, 1)]
    first, second = ([row["eval/win_rate"] for row in rows if "eval/win_rate" in row] for rows in histories)
    ends = [(a + b) / 2 for a, b in ((first[0], second[0]), (first[-1], second[-1]))]
    assert [curve["win_rate"][place]["mean"] for place in (0, -1)] == pytest.approx(ends)
    assert len(curve["win_rate"]) == min(len(first), len(second)) == len(curve["step"]) == len(curve["seconds"])
    assert "Best-of-N" not in record["methods"]


def test_shift(studied, here):
    record = record_of(studied, "shift", "--shift-data", str(studied[0] / "data" / "shifted.jsonl"))
    assert {"PPO+", "ReMax+", SFT, ROWS} < set(record["domains"]["own"])
    out = studied[0] / "out"
    held_out, both = (load_rows(out / "shift" / name, "prompt") for name in ("shifted.jsonl", "prompts.jsonl"))
    assert (len(held_out), len(both)) == (4, 24 + 5)
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in both}
    config = json.loads((out / "seed-1" / "ppo-3-both-domains" / "run.json").read_text())["config"]
    assert config["train_data"] == str(out / "shift" / "prompts.jsonl")
    rewards = [
        json.loads((out / f"seed-{seed}/sft/judged-shifted-1.json").read_text())["rewards"] for seed in (0, 1)
    ]  # fmt: skip
    mean = statistics.fmean(statistics.fmean(seed) for seed in rewards)
    assert record["domains"]["shifted"][SFT]["reward"]["mean"] == pytest.approx(mean)
    assert record["domains"]["shifted"][SFT]["gain_over_sft"] == {"mean": 0.0, "se": 0.0}


def test_other_settings_are_no_resumption(studied, here, capsys):
    directory, flags = studied
    changed = directory / "changed.yaml"
    settings = yaml.safe_load((directory / "pipeline.yaml").read_text())
    settings["common"]["kl_coef"] = 0.2
    (directory / "pipeline.yaml").rename(changed)
    try:
        (directory / "pipeline.yaml").write_text(yaml.safe_dump(settings))
        assert cli.main(["study", "frontier", *flags]) == 1
        assert "was made with kl_coef=0.1, and this study has 0.2" in capsys.readouterr().err
    finally:
        changed.replace(directory / "pipeline.yaml")
    assert cli.main(["study", "winrate", "--out", str(directory / "out"), "--seeds", "2"]) == 1
    assert "seed-0 was made with model=" in capsys.readouterr().err


def test_processes_run_jobs_and_tell_what_failed(tmp_path, capsys):
    jobs = [
        runs.Job("fine", tmp_path / "a" / "log.txt", print, "printed"),
        runs.Job("failing", tmp_path / "b" / "log.txt", float, "words"),
    ]
    with pytest.raises(ValueError, match=r"1 of 2 runs failed \(failing\); the first one's log: .*b/log.txt"):
        runs.run_jobs(jobs, 1)
    assert (tmp_path / "a" / "log.txt").read_text() == "printed\n"
    assert "failing: FAILED, ValueError: could not convert string to float: 'words'" in capsys.readouterr().out


def test_cells_of_the_embedded_world(tmp_path, monkeypatch):
    start = pipeline_of(None, tmp_path, 1)
    assert (start.seed, start.output_dir) == (1, str(tmp_path / "seed-1"))
    write_rows(tmp_path / "seed-1" / "pairs.jsonl.gz", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 640)
    cells = cells_of(start, STRENGTHS)
    assert len({cell.directory for cell in cells}) == len(cells) == sum(map(len, STRENGTHS.values()))
    by_name = {(cell.method, cell.strength): cell.config for cell in cells}
    ground_truth, learned = by_name["PPO-GT", 3.0], by_name["PPO", 3.0]
    assert isinstance(learned, PPOConfig) and learned.reward == str(tmp_path / "seed-1" / "reward")
    assert (ground_truth.reward, ground_truth.kl_coef * 30) == (REWARD, pytest.approx(learned.kl_coef))
    dpo = by_name["DPO", 0.3]
    assert isinstance(dpo, DPOConfig) and (dpo.beta, dpo.epochs, dpo.eval_steps) == (0.3, 3, 10)  # 60 steps, 6 points
    shared = {"train_data": dpo.train_data, "learning_rate": dpo.learning_rate, "epochs": 3, "eval_steps": 10}
    unlikelihood = dataclasses.asdict(by_name["Unlikelihood", 0.3])
    assert shared.items() <= unlikelihood.items() and unlikelihood["alpha"] == 0.3
    assert by_name["Preferred-FT", None].alpha == 0.0
    assert set(MAIN) == set(STRENGTHS) >= set(ONLINE)
    assert all(len(MAIN[name]) == 1 and MAIN[name][0] in strengths for name, strengths in STRENGTHS.items())


def test_who_is_given_the_true_reward(tmp_path):
    start = pipeline_of(None, tmp_path, 0)
    write_rows(tmp_path / "seed-0" / "pairs.jsonl.gz", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 64)
    assert given_true_reward(cells_of(start, STRENGTHS)) == []  # PPO-GT says so itself
    told = dataclasses.replace(start, common=start.common | {"reward": REWARD})
    wanted = {name: STRENGTHS[name] for name in ("DPO", "PPO", "PPO-GT", "Best-of-N")}
    assert given_true_reward(cells_of(told, wanted)) == ["PPO", "Best-of-N"]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_unlikelihood(alpha, tiny_model, tmp_path):
    """Loss and gradient norm of the first step against plain log-softmax."""
    rows = [
        {"prompt": "the film was", "chosen": "good .", "rejected": "really bad ."},
        {"prompt": "i", "chosen": "never liked the plot .", "rejected": "saw it on monday ."},
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    config = UnlikelihoodConfig(
        model=tiny_model,
        output_dir=str(tmp_path / "out"),
        train_data=str(tmp_path / "pairs.jsonl"),
        batch_size=2,
        micro_batch_size=1,
        alpha=alpha,
        max_grad_norm=0.0,
    )
    unlikelihood.train(config)
    (first,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    model, tokenizer = load_policy(tiny_model), load_tokenizer(tiny_model)
    sums = {}
    for name in ("chosen", "rejected"):
        sums[name] = 0.0
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([*prompt, *tokenizer(row[name])["input_ids"], tokenizer.eos_token_id])
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            sums[name] = sums[name] + logprobs[len(prompt) - 1 :].sum() / 2
    loss = alpha * sums["rejected"] - sums["chosen"]
    loss.backward()
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["logps/rejected"] == pytest.approx(sums["rejected"].item(), rel=1e-5)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_expected_best_of_n_over_every_subset():
    torch.manual_seed(0)
    scores, rewards = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    for n in (1, 2, 5, 6):
        got = best_of.expected_reward(scores, rewards, n)
        for row in range(2):
            subsets = list(itertools.combinations(range(6), n))
            chosen = [max(subset, key=lambda i: scores[row, i]) for subset in subsets]
            assert got[row].item() == pytest.approx(statistics.fmean(rewards[row, i].item() for i in chosen), abs=1e-12)
    assert best_of.largest_kl(4) == math.log(4) - 3 / 4


def test_samples_of_a_prompt_stay_together(tiny_model):
    model, tokenizer = load_policy(tiny_model), load_tokenizer(tiny_model)
    rows = [{"prompt": text} for text in ("the film was", "i", "the plot was", "we never")]
    prompts = encode_prompts(load_rows(rows, "prompt"), tokenizer, 16).examples
    seen = []

    def which(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(prompt)) for prompt in prompts]

    reward = Reward(which, tokenizer, model.device)
    (scores,) = sample_scores(model, tokenizer, prompts, [reward], max_new_tokens=5, samples=3)
    assert scores.tolist() == [[float(len(row["prompt"]))] * 3 for row in rows]
    assert len({completion for prompt, completion in seen if prompt == "the film was"}) > 1
    seen.clear()
    (greedy,) = sample_scores(model, tokenizer, prompts, [reward], max_new_tokens=5, temperature=0)
    assert greedy.shape == (4, 1)
    with torch.no_grad():
        ids = torch.tensor([prompts[0].prompt_ids])
        first = model(ids).logits[0, -1].argmax().item()
    assert dict(seen)["the film was"].split()[0] == tokenizer.decode([first]).strip()
    with pytest.raises(ValueError, match="samples: expected 1 at temperature 0, got 2"):
        sample_scores(model, tokenizer, prompts, [reward], max_new_tokens=5, samples=2, temperature=0)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainedStudyConfig, {"seeds": 1}, "seeds: expected an integer >= 2"),
        (WinRateConfig, {"workers": 0}, "workers: expected an integer >= 1"),
        (FrontierConfig, {"kl_to": 0.0}, "kl_to: expected a number > 0"),
        (TemperatureConfig, {"temperatures": [0.5, 0.5]}, "temperatures: expected distinct numbers >= 0"),
        (ShiftConfig, {"pipeline": "p.yaml"}, "shift_data: expected it with pipeline"),
        (ConvergenceConfig, {"seeds": 0}, "seeds: expected"),
    ],
)
def test_config_errors(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_rows_without_completions_are_an_error(tmp_path, tiny_model):
    write_rows(tmp_path / "eval.jsonl", [{"prompt": "the film was"}])
    config = judge.JudgeConfig(model=tiny_model, eval_data=str(tmp_path / "eval.jsonl"), eval_reward=REWARD)
    with pytest.raises(ValueError, match=r"eval.jsonl: expected a completion column"):
        judge._judge([(Path(tmp_path / "judged.json"), config)])
    assert not (tmp_path / "judged.json").exists()


def test_policies_are_judged_on_rows_as_their_stages_read_them(tmp_path, tiny_model):
    """Columns, template and its options of the run: the completions are those of a row in our form."""
    template = (
        "{% for m in messages %}{{ 'the ' if m.role == 'assistant' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}{{ 'the ' if the else 'never ' }}{% endif %}"
    )
    names = {"prompt": "question", "completion": "answer"}
    rows = [{"question": [{"role": "user", "content": "film was"}], "answer": "good ."}]
    write_rows(tmp_path / "chat.jsonl", rows)
    write_rows(tmp_path / "text.jsonl", [{"prompt": "film was the", "completion": "good ."}])
    shared = {"model": tiny_model, "eval_reward": REWARD, "temperature": 0.0, "max_response_length": 6}
    options = {"columns": names, "chat_template": template, "chat_template_kwargs": {"the": True}}
    parts = []
    for name, more in (("chat", options), ("text", {})):
        config = judge.JudgeConfig(eval_data=str(tmp_path / f"{name}.jsonl"), **shared, **more)
        judge._judge([(tmp_path / f"{name}.json", config)])
        parts.append(json.loads((tmp_path / f"{name}.json").read_text()))
        chosen = best_of.BestOfConfig(
            **{name: value for name, value in shared.items() if name != "temperature"},
            eval_data=str(tmp_path / f"{name}.jsonl"),
            output_dir=str(tmp_path / name),
            reward=REWARD,
            samples=2,
            **more,
        )
        best_of.sample(chosen)
    for key in ("rewards", "completion_rewards"):
        assert parts[0][key] == parts[1][key]
    assert torch.equal(best_of.load(tmp_path / "chat")[1], best_of.load(tmp_path / "text")[1])


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_pipeline_without_a_stage_is_no_start(name, tmp_path):
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: m\noutput_dir: out\n{name}: null\n")
    with pytest.raises(ValueError, match=f"pipeline.yaml: {name}: expected a section, because every study starts"):
        pipeline_of(str(file), tmp_path, 0)
