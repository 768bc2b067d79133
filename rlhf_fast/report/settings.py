"""The settings in which runs differ, and the held-out figures of stages without samples, as tables of a report."""

import json
from collections.abc import Sequence
from typing import Any

from rlhf_fast.report.plots import MethodRun
from rlhf_fast.training.made import FREE

_SHOWN = 300  # characters of a value; the table wraps
_HELD_OUT = {"eval/loss": "loss", "eval/accuracy": "accuracy"}


def differences(runs: Sequence[MethodRun]) -> list[dict[str, Any]]:
    """A row for each setting that is not the same in all runs that have ended; "-" where a run's stage has no such.

    Settings on which no number depends, such as output_dir, are left out.
    """
    configs = {run.name: run.record["config"] for run in runs if "config" in run.record}
    if len(configs) < 2:
        return []
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in FREE)
    rows = []
    for key in keys:
        values = {name: _text(config[key]) if key in config else None for name, config in configs.items()}
        if len(set(values.values())) > 1:
            rows.append({"setting": key} | {name: text and _short(text) for name, text in values.items()})
    return rows


def held_out(runs: Sequence[MethodRun]) -> list[dict[str, Any]]:
    """A row for each run whose run.json has figures of held-out rows: (mean, standard error) where both are known."""
    rows = []
    for run in runs:
        found = {
            title: (value, run.record[f"{key}_se"]) if f"{key}_se" in run.record else value
            for key, title in _HELD_OUT.items()
            if (value := run.record.get(key)) is not None
        }
        if found:
            rows.append({"method": run.name, **found})
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
