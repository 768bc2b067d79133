"""Trackers get the config, the metrics under Trainer's names, the samples and the report; a resumed run goes on."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_fast.config import SFTConfig
from rlhf_fast.stages import sft
from rlhf_fast.training.trackers import NOTE, TRACKERS, Tracker, tracked, trackers
from tests.support.stages import STAGES, stage_config

SAMPLES = [{"prompt": "a", "completion": "b|c", "reward": 0.5}]
HEARD = []


class Heard(Tracker):
    """A tracker of a user's own, which `track` names by its class."""

    name, module = "heard", "json"

    def open(self, name, config, earlier):
        HEARD.append(("open", name, config["model"], earlier))
        return "run-1"

    def write(self, numbers, step):
        HEARD.append(("write", step, numbers))

    def table(self, name, columns, rows):
        HEARD.append(("table", name, columns, rows))

    def file(self, path):
        HEARD.append(("file", path.name))

    def close(self):
        HEARD.append(("close",))


def running(directory, first_step=1):
    config = SFTConfig(model="m", output_dir=str(directory), train_data="rows.jsonl")
    return SimpleNamespace(config=config, first_step=first_step)


def finish(directory, steps=2):
    """The files that a finished run leaves."""
    rows = [{"step": s, "time/elapsed": 1.0, "time/step": 1.0, "loss": 1.0 / s} for s in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "run.json").write_text(json.dumps({"stage": "SFT", "static_bytes": {}}))
    (directory / "samples.json").write_text(json.dumps(SAMPLES))
    (directory / "samples_before.json").write_text(json.dumps([SAMPLES[0] | {"completion": "x", "reward": 0.25}]))


def track(tracker, directory, steps, first_step=1, *, finished=True):
    tracker.begin(running(directory, first_step))
    for step in steps:
        tracker.log(step, {"step": step, "loss": step / 4, "eval/reward": 0.5, "stage": "SFT"})
    if finished:
        finish(directory)
    tracker.end()


def test_names_are_those_of_trainer():
    row = {"step": 3, "loss": 0.5, "rewards/chosen": 1.0, "eval/reward": 2.0, "note": "x", "grad_norm": None}
    assert tracked(row) == {"train/loss": 0.5, "train/rewards/chosen": 1.0, "eval/reward": 2.0}


def test_a_stage_tracks_by_a_class_of_its_users(files, tiny_model, tmp_path):
    HEARD.clear()
    module, config_class = STAGES["ppo"]
    config = stage_config(config_class, files, tiny_model, tmp_path / "run")
    module.train(dataclasses.replace(config, track=[f"{__file__}:Heard"], eval_data=files["prompts"]))
    heard = sys.modules[next(name for name in sys.modules if name.endswith(__file__.encode().hex()))].HEARD
    assert heard[0] == ("open", "run", tiny_model, None) and heard[-1] == ("close",)
    steps = [call[1] for call in heard if call[0] == "write"]
    assert steps == list(range(config.steps + 1))
    written = next(call[2] for call in heard if call[0] == "write" and call[1] == 1)
    assert {"train/objective/kl", "train/loss/policy_avg", "train/lr"} <= written.keys()
    (table,) = [call for call in heard if call[0] == "table"]
    assert table[2] == ["prompt", "completion before", "completion after", "reward before", "reward after"]
    assert len(table[3]) == 32 and table[3][0][1:3] != ["", ""]
    assert [call[1] for call in heard if call[0] == "file"] == ["run.json", "report.html"]


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path):
    HEARD.clear()
    track(Heard(), tmp_path, [1], finished=False)
    assert json.loads((tmp_path / NOTE).read_text()) == {"heard": "run-1"}
    assert not any(call[0] in ("table", "file") for call in HEARD)  # it has not finished
    HEARD.clear()
    track(Heard(), tmp_path, [2], first_step=2)
    assert HEARD[0] == ("open", tmp_path.name, "m", "run-1")
    HEARD.clear()
    track(Heard(), tmp_path, [1])  # a new run in the same directory
    assert HEARD[0][3] is None


def scalars(directory, name):
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard(tmp_path):
    board = TRACKERS["tensorboard"]
    track(board(), tmp_path, [1, 2])
    assert scalars(tmp_path, "train/loss") == [(1, 0.25), (2, 0.5)]
    track(board(), tmp_path, [1, 2, 3])  # a new run shows its own curves only
    track(board(), tmp_path, [3, 4], first_step=3)  # and a resumed run no step twice
    assert scalars(tmp_path, "train/loss") == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert scalars(tmp_path, "eval/reward")[0] == (1, 0.5)
    text = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("samples/text_summary")
    assert b"b\\|c | 0.25 | 0.5 |" in text[-1].tensor_proto.string_val[0]


IN_WANDB = """
from pathlib import Path
from tests.training.test_trackers import TRACKERS, track
directory = Path({directory!r})
track(TRACKERS["wandb"](), directory, [1, 2], finished=False)
track(TRACKERS["wandb"](), directory, [3], first_step=3)
print("FOUND")
"""


def offline_rows(file):
    """The metrics in a file of offline wandb: records of protobuf in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
    return rows


def run_apart(code, directory, **variables):
    """The last line that starts with FOUND of the code in a process of its own, whose trackers stay there."""
    root = os.getcwd()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **variables}
    command = [sys.executable, "-c", code.format(tests=root, directory=str(directory))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))


def test_wandb_offline(tmp_path):
    """The files are read when the process has ended, because wandb's own process may write them until then."""
    run_apart(IN_WANDB, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1
    rows = [row for file in files for row in offline_rows(file)]
    losses = [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [("1", "0.25"), ("2", "0.5"), ("3", "0.75")]
    assert any("samples" in key for row in rows for key in row)


IN_TRACKIO = """
import json, os, sqlite3
from pathlib import Path
from tests.training.test_trackers import TRACKERS, track
directory = Path({directory!r})
track(TRACKERS["trackio"](), directory, [1, 2], finished=False)
track(TRACKERS["trackio"](), directory, [3], first_step=3)
(database,) = Path(os.environ["TRACKIO_DIR"]).glob("rlhf_fast*.db")
rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by step").fetchall()
numbers = [(name, step, json.loads(text)) for name, step, text in rows]
print("FOUND", {{name for name, *_ in numbers}}, [(s, r["train/loss"]) for _, s, r in numbers if "train/loss" in r],
      sum("samples" in r for *_, r in numbers))
"""


def test_trackio(tmp_path):
    store = {"TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    found = run_apart(IN_TRACKIO, tmp_path, **store)
    assert found == f"FOUND {{'{tmp_path.name}'}} [(1, 0.25), (2, 0.5), (3, 0.75)] 1"


def test_mlflow_gets_what_its_functions_take(tmp_path, monkeypatch):
    calls = []

    class Module:
        def __getattr__(self, name):
            def call(*args, **options):
                calls.append((name, args, options))
                return SimpleNamespace(info=SimpleNamespace(run_id="id-7"))

            return call

    monkeypatch.setitem(sys.modules, "mlflow", Module())
    track(TRACKERS["mlflow"](), tmp_path, [1], finished=False)
    track(TRACKERS["mlflow"](), tmp_path, [2], first_step=2)
    names = [name for name, *_ in calls]
    assert names[:4] == ["set_experiment", "start_run", "log_params", "log_metrics"]
    assert ("start_run", (), {"run_id": "id-7"}) in calls and names.count("log_params") == 1
    assert ("log_metrics", ({"train/loss": 0.25, "eval/reward": 0.5},), {"step": 1}) in calls
    assert [options["artifact_file"] for name, _, options in calls if name == "log_table"] == ["samples.json"]
    assert names[-1] == "end_run"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "expected the package wandb for wandb, found none; pip install wandb"),
        ("wandbb", "expected one of wandb, trackio, tensorboard, mlflow, or package.module:Class, got 'wandbb'"),
        ("json:Nothing", "expected a class without arguments at json:Nothing, got module 'json' has no attribute"),
        ("json:JSONDecoder", "expected a `Listener` at json:JSONDecoder, got an object without begin, collected"),
    ],
)
def test_what_is_not_there_is_one_line(name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=f"track: {message}"):
        trackers([name])


def test_a_tracker_is_looked_up_before_anything_runs(files, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = stage_config(STAGES["sft"][1], files, tiny_model, tmp_path / "run")
    with pytest.raises(ValueError, match="pip install wandb"):
        sft.train(dataclasses.replace(config, track=["wandb"]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
