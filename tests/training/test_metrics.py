"""The JSON lines hold exactly what was logged, whatever happens to the run; numbers read well."""

import io
import itertools
import json
import math
import re
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from rlhf_fast.training.metrics import MetricsLogger, format_value, markdown_table, print_table, read_metrics


def run(tmp_path, steps, total=None, **options) -> list[dict]:
    """Logs {"loss": step / 4} for the given steps and returns the rows without their clock."""
    with MetricsLogger(tmp_path, total or max(steps), description="ppo", **options) as logger:
        for step in steps:
            logger.log(step, {"loss": step / 4})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    clock = [row.pop("time/elapsed") for row in rows]
    assert clock == sorted(clock) and clock[0] >= 0
    return rows


def test_rows_hold_what_was_logged(tmp_path):
    with MetricsLogger(tmp_path / "out", 2, description="ppo") as logger:
        logger.log(1, {"a": torch.tensor(0.5), "b": np.float64(0.1), "c": np.int64(7), "d": math.nan, "e": -math.inf})
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 1  # on disk before the run ends
        logger.log(2, {"a": 2, "time/elapsed": 9.0, "text": "x"})
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    del rows[0]["time/elapsed"]
    assert rows == [
        {"step": 1, "a": 0.5, "b": 0.1, "c": 7, "d": None, "e": None},
        {"step": 2, "time/elapsed": 9.0, "a": 2, "text": "x"},
    ]


def test_nothing_is_lost_when_the_run_dies(tmp_path):
    with pytest.raises(RuntimeError), MetricsLogger(tmp_path, 100, description="ppo") as logger:
        for step in range(1, 4):
            logger.log(step, {"loss": step})
        raise RuntimeError
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 3)]


def text_of(path, steps: int) -> str:
    """The lines of the first steps."""
    return "".join(path.read_text().splitlines(keepends=True)[:steps])


def test_resume_drops_the_steps_that_are_run_again(tmp_path):
    run(tmp_path, range(1, 8), total=10)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the line a crash cut short
    rows = run(tmp_path, range(6, 11), total=10, resume_step=5, earlier=text_of(path, 5))
    assert rows == [{"step": step, "loss": step / 4} for step in range(1, 11)]
    assert [row["step"] for row in run(tmp_path, [1, 2], total=2)] == [1, 2]  # a new run starts a new file


def test_clock_continues_after_resume(tmp_path):
    row = {"step": 1, "time/elapsed": 1000.0}
    with MetricsLogger(tmp_path, 2, description="ppo", resume_step=1, earlier=json.dumps(row) + "\n") as logger:
        logger.log(2, {})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == row and 1000 <= rows[1]["time/elapsed"] < 1060


def test_a_row_that_found_no_room_is_in_the_text(tmp_path):
    with MetricsLogger(tmp_path, 2, description="ppo") as logger:
        logger.log(1, {"loss": 0.5})
        with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as full:
            logger._file = full
            logger._write({"step": 2, "time/elapsed": 1.0, "loss": 0.25})
    assert [json.loads(line)["loss"] for line in logger.text.splitlines()] == [0.5, 0.25]


def test_plain_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, 2250.5).__next__)
    run(tmp_path, range(1, 41), show=("objective/scores", "loss"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "ppo  1/40  0:37:30  loss 0.2500"
    assert lines[-1] == "ppo  40/40  1 day, 1:00:20  loss 10.00"


def test_bar_in_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    run(tmp_path, range(1, 4), show=("loss",))
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", screen.getvalue()).split("\r")[-1]
    assert re.fullmatch(r"ppo ━+ 3/3 0:\d\d:\d\d < \S+ loss 0.7500\s*", shown)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="total_steps: expected at least 1, got 0"):
        MetricsLogger(tmp_path, 0, description="ppo")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("memory/rollout", 123456789, "117.7 MiB"),
        ("peak_bytes", 5 * 2**30, "5,120.0 MiB"),
        ("time/step", 0.0123456, "12.3 ms"),
        ("seconds", 75.04, "75.0 s"),
        ("reward", (0.81234, 0.00412), "0.8123 ± 0.0041"),
        ("reward", (12.3456, 1.5), "12.3 ± 1.5"),
        ("reward", (0.5, 0.0), "0.500 ± 0.000"),
        ("reward", (0.5, 1e-16), "0.5000 ± 0.0000"),
        ("reward", (0.5, math.nan), "0.500 ± nan"),
        ("tokens", 1234567, "1,234,567"),
        ("kl", 3.0, "3.000"),
        ("lr", 3e-6, "3e-06"),
        ("kl", math.nan, "nan"),
        ("kl", None, "-"),
        ("done", True, "True"),
    ],
)
def test_numbers_for_people(key, value, text):
    assert format_value(key, value) == text


def test_table_shows_every_cell():
    screen = io.StringIO()
    rows = [{"method": "ppo [a]", "reward": (0.8, 0.01)}, {"method": "remax", "kl": 2.5}]
    print_table("Results [1]", rows, console=Console(file=screen))
    lines = [line.strip() for line in screen.getvalue().splitlines()]
    assert lines[0] == "Results [1]"
    assert lines[2] == "┃ method  ┃        reward ┃    kl ┃"
    assert lines[4:6] == ["│ ppo [a] │ 0.800 ± 0.010 │     - │", "│ remax   │             - │ 2.500 │"]


def test_markdown_leaves_the_unit_to_the_cells():
    rows = [{"method": "PPO", "step seconds": 0.5, "peak bytes": 2**20}, {"method": "DPO", "kl": None}]
    assert markdown_table(rows).splitlines() == [
        "| method | step | peak | kl |",
        "| --- | --- | --- | --- |",
        "| PPO | 500 ms | 1.0 MiB |  |",
        "| DPO |  |  | - |",
    ]
