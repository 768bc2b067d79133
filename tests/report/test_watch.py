"""`rlhf-fast watch` shows the last values and curves of the run that wrote last."""

import io
import os

import pytest
from rich.console import Console
from test_report_of_runs import write_run

from rlhf_fast.config import WatchConfig
from rlhf_fast.report.watch import ended, newest, run, view


def text(directory, width=100, height=40):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(view(directory, width, height))
    return console.export_text()


def test_panels_have_the_last_value_and_fit_the_terminal(tmp_path):
    write_run(tmp_path / "ppo", "PPO", objective__scores=0.25, loss__policy_avg=-0.5, grad_norm=3.0)
    shown = text(tmp_path / "ppo")
    assert shown.startswith("PPO ") and " step 4  0:00:04  ended  1.0 s a step" in shown
    assert [title in shown for title in ("score of the sampled completions: 1.000", "loss: -2.000", "12.00")] == [
        True, True, True
    ]  # fmt: skip
    assert max(map(len, shown.splitlines())) <= 100 and len(shown.splitlines()) <= 40
    assert any(0x2800 < ord(letter) < 0x2900 for letter in shown)  # braille
    low = text(tmp_path / "ppo", width=60, height=14)
    assert "score" in low and "loss" not in low and len(low.splitlines()) <= 14


def test_the_run_that_wrote_last_is_shown(tmp_path, capsys):
    for age, name in enumerate(("dpo", "sft")):
        write_run(tmp_path / name, name, loss=0.5, ended=name == "sft")
        os.utime(tmp_path / name / "metrics.jsonl", (2000 - age, 2000 - age))
    assert newest(str(tmp_path)).name == "dpo"
    assert not ended(tmp_path / "dpo") and ended(tmp_path / "sft")
    run(WatchConfig(dir=str(tmp_path)))  # no terminal: it prints once and returns
    assert "DPO " in (printed := capsys.readouterr().out) and "running" in printed
    with pytest.raises(ValueError, match="dir: expected a directory with metrics.jsonl"):
        run(WatchConfig(dir=str(tmp_path / "nowhere")))


def test_a_run_without_a_step_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "no step yet" in text(tmp_path)
