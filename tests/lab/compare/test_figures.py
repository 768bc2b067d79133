"""The comparison's arithmetic on run directories written by hand."""

import json

import pytest

from rlhf_fast.lab.compare.cells import Cell
from rlhf_fast.lab.compare.figures import figures_of, median_over_seeds, time_model
from rlhf_fast.lab.compare.plots import step_time

MIB = 2**20


def _write(directory, steps, *, method="remax", static=None, config=None, evaluations=()):
    directory.mkdir()
    (directory / "result.json").write_text(json.dumps({"ran": True, "baseline_bytes": 100 * MIB}))
    run = {
        "config": {"batch_size": 8, **(config or {})},
        "static_bytes": static or {"policy": {"weights": 4 * MIB, "gradients": 4 * MIB, "optimizer": 8 * MIB}},
        "parameters": {"policy": MIB},
        "environment": {"torch": "2"},
    }
    (directory / "run.json").write_text(json.dumps(run))
    rows = [{"step": 0, "time/total": 0.0, **evaluations[0]}] if evaluations else []
    rows += [{"step": n, **row} for n, row in enumerate(steps, 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Cell("ReMax", directory.name, method, 0, {})


def _step(rollout, update, *, other=0.0, memory=0, **more):
    seconds = {"time/rollout": rollout, "time/policy_update": update, "time/step": rollout + update + other}
    peaks = {"memory/rollout": 110 * MIB, "memory/policy_update": memory} if memory else {}
    return {**seconds, **peaks, **more}


def test_times_leave_out_the_first_steps_and_evaluations(tmp_path):
    steps = [_step(9, 9), _step(9, 9), _step(1, 3, other=0.5), _step(2, 3, other=0.5), _step(3, 4, other=0.5)]
    steps[2] |= {"time/evaluation": 7.0, "time/step": 11.5}
    cell = _write(tmp_path / "b", [s | {"memory/policy_update": 150 * MIB} for s in steps])
    figures = figures_of(cell, tmp_path / "b")
    assert figures["phase_seconds"] == {"rollout": 2, "policy_update": 3}
    assert figures["step_seconds"] == 5.5
    assert figures["samples_per_second"] == pytest.approx(8 / 5.5)


def test_memory_is_above_the_process_and_activations_above_the_static_bytes(tmp_path):
    steps = [_step(1, 1, memory=150 * MIB), _step(1, 1), _step(1, 1, memory=180 * MIB)]
    figures = figures_of(_write(tmp_path / "a", steps), tmp_path / "a")
    assert figures["phase_peak_bytes"] == {"rollout": 10 * MIB, "policy_update": 80 * MIB}
    assert figures["peak_bytes"] == 80 * MIB
    assert figures["activation_bytes"] == (80 - 16) * MIB


def test_reward_by_minute_and_by_prompt(tmp_path):
    def evaluation(reward):
        return {"eval/reward": reward, "eval/reward_se": 0.01, "eval/kl": 1.0}

    memory = {"memory/rollout": 101 * MIB}
    steps = [_step(1, 1) | memory, _step(1, 1) | {"time/total": 30.0} | evaluation(0.7)]
    cell = _write(tmp_path / "a", steps, method="rloo", config={"group_size": 4}, evaluations=[evaluation(0.5)])
    reward = figures_of(cell, tmp_path / "a")["reward"]
    assert reward["gain"] == pytest.approx(0.2)
    assert reward["gain_per_minute"] == pytest.approx(0.4)
    assert reward["gain_per_1000_prompts"] == pytest.approx(0.2 / 4 * 1000)  # 2 steps of 8 / 4 prompts
    assert [point["prompts"] for point in reward["curve"]] == [0, 4]


def test_a_run_that_did_not_fit(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps({"ran": False, "error": "out of memory"}))
    figures = figures_of(Cell("PPO", "a", "ppo", 0, {}), tmp_path / "a")
    assert not figures["ran"] and figures["error"] == "out of memory"
    assert median_over_seeds([figures]) == [figures]
    assert time_model([figures]) == []


def test_the_time_model():
    def result(name, step, **phases):
        return {"name": name, "ran": True, "step_seconds": step, "phase_seconds": phases}

    results = [
        result("REINFORCE", 10.0, rollout=4.0, scoring=1.0, policy_update=4.0, optimizer=1.0),
        result("ReMax", 11.5, rollout=5.0, scoring=1.5, policy_update=4.0, optimizer=1.0),
        result("PPO", 16.0, rollout=4.0, scoring=1.0, policy_update=4.0, value_update=5.0, optimizer=2.0),
    ]
    rows = {row["method"]: row for row in time_model(results)}
    # t_gen 4, t_back 4 + 1, shared 1; folding costs a quarter of a decode
    assert rows["PPO"]["predicted seconds"] == 4 + 2 * 5 + 1
    assert rows["PPO"]["measured seconds"] == 16
    assert rows["ReMax"]["predicted seconds"] == 1.25 * 4 + 5 + 1
    assert rows["ReMax"]["model"] == "(1 + 0.25) t_gen + t_back"
    assert rows["ReMax, two decodes"]["predicted seconds"] == 2 * 4 + 5 + 1
    assert rows["ReMax, two decodes"]["measured seconds"] is None
    assert time_model(results[1:]) == []


def test_medians_over_seeds():
    rows = [
        {"name": "PPO", "ran": True, "seed": s, "step_seconds": t, "reward": None} for s, t in ((0, 1), (1, 5), (2, 2))
    ]
    assert median_over_seeds(rows) == [{"name": "PPO", "ran": True, "seed": 1, "step_seconds": 2, "reward": None}]


@pytest.mark.parametrize(
    ("slowest", "label", "number"),
    [(0.5, "median time of a step (ms)", "500"), (2.5, "median time of a step (s)", "2.5")],
)
def test_a_step_of_a_second_is_drawn_in_seconds(slowest, label, number):
    rows = [{"name": "PPO", "step_seconds": slowest, "phase_seconds": {"rollout": 0.2}}]
    (axes,) = step_time(rows).axes
    assert axes.get_xlabel() == label and [text.get_text() for text in axes.texts] == [number]
