"""`rlhf-fast report` finds runs of any stage, names them apart, and shows what they have."""

import json

import pytest

from rlhf_fast.config import ReportConfig
from rlhf_fast.report.curves import CURVES, make_curves, points, smoothed
from rlhf_fast.report.plots import MethodRun
from rlhf_fast.report.runs import find_runs, load_runs, run
from rlhf_fast.report.settings import differences, held_out

ENVIRONMENT = {"device": "x86_64", "threads": 2, "torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.0"}


def write_run(directory, stage, *, ended=True, beta=0.1, **numbers):
    """The files of a run of four steps whose metrics are numbers[name] * step."""
    directory.mkdir(parents=True)
    rows = [
        {"step": step, "time/elapsed": step, "time/step": 1.0, "time/policy_update": 0.75, "time/total": float(step)}
        | {name.replace("__", "/"): value * step for name, value in numbers.items()}
        for step in range(1, 5)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        config = {"beta": beta, "learning_rate": 1e-5, "output_dir": str(directory)}
        record = {"stage": stage, "config": config, "environment": ENVIRONMENT, "eval/loss": 0.5, "eval/accuracy": 0.75}
        record |= {"eval/accuracy_se": 0.05, "static_bytes": {"policy": {"weights": 2**20}}}
        (directory / "run.json").write_text(json.dumps(record))


def test_runs_without_evaluations_have_a_report(tmp_path):
    write_run(tmp_path / "runs" / "dpo", "DPO", loss=0.5, grad_norm=2.0)
    write_run(tmp_path / "other" / "dpo", "DPO", beta=0.2, loss=0.25)
    output = tmp_path / "out" / "report.html"
    run(ReportConfig(dirs=[str(tmp_path / "runs"), str(tmp_path / "other" / "dpo")], output=str(output)))
    report = json.loads(output.with_suffix(".json").read_text())
    names = ["DPO (runs/dpo)", "DPO (other/dpo)"]
    assert list(report["methods"]) == names and report["quality"] == []
    assert report["settings"] == [{"setting": "beta", names[0]: "0.1", names[1]: "0.2"}]
    assert report["held_out"] == [{"method": name, "loss": 0.5, "accuracy": [0.75, 0.05]} for name in names]
    assert [(row["steps"], row["step seconds"], row["model bytes"]) for row in report["cost"]] == [(4, 1.0, 2**20)] * 2
    html = output.read_text()
    assert "x86_64, 2 threads, torch 2.13.0" in html
    assert [f'id="{name}"' in html for name in ("loss", "grad_norm", "reward_kl")] == [True, True, False]


def test_a_run_that_has_not_ended_is_shown_and_named(tmp_path):
    write_run(tmp_path / "ppo", "PPO", ended=False, objective__scores=0.5)
    run(ReportConfig(dirs=[str(tmp_path)], output=str(tmp_path / "r.html")))
    assert "No run.json, because the run has not ended: PPO." in (tmp_path / "r.html").read_text()


def test_a_folder_gives_its_runs_in_the_order_of_the_stages(tmp_path):
    for name in ("zebra", "ppo", "reward", "sft", "dpo"):
        write_run(tmp_path / name, name)
    (tmp_path / "plots").mkdir()
    assert [directory.name for directory in find_runs([str(tmp_path)])] == ["sft", "reward", "ppo", "dpo", "zebra"]
    assert len(find_runs([str(tmp_path), str(tmp_path / "ppo")])) == 5  # each once


def test_where_there_is_no_run_the_error_names_the_directory(tmp_path):
    with pytest.raises(ValueError, match=r"dirs: expected .* got .*nowhere, no directory"):
        find_runs([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="a folder without it"):
        find_runs([str(tmp_path)])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"dirs: expected rows in .*metrics.jsonl, found none yet"):
        load_runs(find_runs([str(tmp_path)]))
    with pytest.raises(ValueError, match="output: expected a path that ends in .html, got 'report.pdf'"):
        ReportConfig(dirs=["runs"], output="report.pdf")


def test_a_panel_takes_the_first_name_that_a_run_has():
    history = [{"step": step, "loss/policy_avg": -step, "objective/scores": None} for step in (1, 2, 3)]
    found = MethodRun(name="PPO", history=history)
    assert points(found, CURVES["loss"]) == ([1, 2, 3], [-1.0, -2.0, -3.0])
    assert points(found, CURVES["scores"]) == ([], [])
    figures = make_curves([found])
    assert list(figures) == ["loss"]
    assert figures["loss"].axes[0].lines[0].get_xydata().tolist() == [[1, -1], [2, -2], [3, -3]]


def test_a_curve_is_smoothed_by_the_mean_of_a_window():
    assert smoothed([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    values = [float(i % 2) for i in range(22)]
    assert smoothed(values)[1:-1] == pytest.approx([1 / 3 if i % 2 == 0 else 2 / 3 for i in range(20)], rel=1e-12)


def test_settings_of_one_run_do_not_differ():
    alone = MethodRun(name="DPO", history=[{"step": 1}], record={"config": {"beta": 0.1}})
    assert differences([alone]) == [] and held_out([alone]) == []
