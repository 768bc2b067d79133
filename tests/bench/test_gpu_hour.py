"""The first hour on a GPU: what hangs is ended, what is missing is resumed, predictions, the patch, the wheels."""

import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bench.gpu import choice, command, sanitizer, wheels
from bench.gpu.hour import conduct
from bench.gpu.part import Found, Part, Setting
from bench.gpu.parts import PARTS
from bench.gpu.predict import BYTES, FLOPS, PROCESS, SHARE, Work, seconds
from bench.gpu.record import DONE, FAILED, KILLED, NOT_BEGUN, NOT_MEASURED, Record
from bench.gpu.runs import RUNS, load

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json, os, signal, subprocess, sys, time
name, setting, found = sys.argv[1:]
def leave(rows, failures=()):
    rows = [{"what": what, "measured": "1", "beside": ""} for what in rows]
    json.dump({"rows": rows, "failures": list(failures)}, open(found, "w"))
leave(["first"])
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.environ["PIDS"], "w").write(str(child.pid))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if name == "crashes":
    print("Traceback", "RuntimeError: CUDA error: misaligned address", sep="\\n")
    sys.exit(1)
if name == "aborts":
    os.abort()
if name == "wrong":
    leave(["first"], ["gae: off by 3"])
    sys.exit(1)
leave(["first", "second"])
"""


def part(name, limit=20.0, predicted=PROCESS):
    work = [Work(seconds=predicted - PROCESS)]
    return Part(name=name, help="", limit=limit, work=lambda _: work)


@pytest.fixture
def hour(tmp_path, monkeypatch):
    """Runs parts by name in fresh processes that do as their name says; the record."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    names = ["fine", "hangs", "crashes", "aborts", "wrong", "late"]

    def run(*parts, record=None, budget=100.0):
        record = record or Record.begin(tmp_path / "gpu.json", names, {"cpu": "x"}, dry=True)
        child = [sys.executable, "-S", str(tmp_path / "child.py")]
        conduct(parts, record, Setting(True, results=tmp_path), budget, child, say=lambda _: None)
        return record

    return run


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_that_hangs_is_ended_with_its_children_and_its_rows_stay(hour, tmp_path):
    began = time.monotonic()
    record = hour(part("hangs", limit=1.5), part("fine"))
    assert time.monotonic() - began < 15
    hung = record.content["parts"]["hangs"]
    assert hung["state"] == KILLED and hung["why"] == "it had not ended after 2 s" and 1.4 < hung["seconds"] < 10
    assert [row["what"] for row in hung["rows"]] == ["first"] and record.state("fine") == DONE
    assert not alive(int((tmp_path / "pids").read_text()))


def test_a_part_that_crashes_is_noted_and_the_others_run(hour):
    record = hour(*map(part, ("crashes", "aborts", "wrong", "fine")))
    parts = record.content["parts"]
    assert [parts[name]["state"] for name in ("crashes", "aborts", "wrong", "fine")] == [FAILED] * 3 + [DONE]
    assert parts["crashes"]["why"] == "exit code 1: RuntimeError: CUDA error: misaligned address"
    assert parts["aborts"]["why"].startswith("signal 6") and parts["wrong"]["why"] == "1 wrong"
    assert "| wrong | **WRONG** | gae: off by 3 |" in record.path.with_suffix(".md").read_text()
    assert json.loads(record.path.read_text()) == record.content


def test_a_part_that_does_not_fit_is_not_begun(hour):
    record = hour(part("fine", predicted=30.0), part("late", predicted=11.0), budget=20.0)
    assert record.state("late") == DONE and record.content["parts"]["fine"]["state"] == NOT_BEGUN
    assert record.content["parts"]["fine"]["why"] == "predicted to take 30 s, and 20 s are left"
    assert "| fine | **not begun**: predicted to take 30 s, and 20 s are left |" in record.markdown()
    assert record.state("hangs") == NOT_MEASURED and "| hangs | **not measured** |" in record.markdown()


def test_a_second_call_takes_the_parts_that_are_missing_those_never_tried_first(hour, tmp_path):
    first = hour(part("fine"), part("crashes"), part("late", predicted=1000.0))
    again = Record.resume(first.path, first.names, dry=True)
    assert again.missing() == ["hangs", "aborts", "wrong", "late", "crashes"]
    hour(part("late"), record=again)
    assert again.state("late") == DONE and again.state("fine") == DONE and "late" not in again.missing()
    with pytest.raises(ValueError, match="--resume: expected the results of no dry run"):
        Record.resume(first.path, first.names, dry=False)
    with pytest.raises(
        ValueError, match="--resume: expected the results of an earlier call at .*none.json, found none"
    ):
        Record.resume(tmp_path / "none.json", [], dry=True)


def test_predictions_are_bytes_and_flops_over_an_h200_s_rates():
    assert Work(bytes=BYTES).total == pytest.approx(1 / SHARE) == Work(flops=FLOPS).total
    assert Work(bytes=BYTES, flops=FLOPS / 2, launches=1e4).total == pytest.approx(1 / SHARE)
    assert Work(launches=1e6, bytes=1).total == pytest.approx(8.0)
    assert seconds([Work(seconds=2).times(3)]) == PROCESS + 6


def test_all_parts_fit_into_nine_minutes_and_each_into_its_limit():
    real = Setting(dry=False)
    times = {part.name: part.predicted(real) for part in PARTS}
    assert sum(times.values()) < 60 * command.MINUTES == 540
    for each in PARTS:
        assert PROCESS < times[each.name] <= 0.75 * each.limit, each.name
        assert each.predicted(Setting(dry=True)) < 40
    names = [part.name for part in PARTS]
    assert names == list(RUNS) and all(callable(load(name)) for name in names)
    assert [row["part"] for row in command.predictions(names)] == [*names, "all"]


def test_rows_are_written_one_by_one(tmp_path):
    found = Found(tmp_path / "found.json")
    found.row("a", "1 ms")
    with found.expecting("b"):
        raise ValueError("two\nlines")
    assert json.loads(found.path.read_text()) == {
        "rows": [{"what": "a", "measured": "1 ms", "beside": ""}], "failures": ["b: ValueError: two lines"],
        "details": {},
    }  # fmt: skip
    with pytest.raises(RuntimeError), found.expecting("c"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_the_faster_back_end_by_size():
    def times(*pairs):
        return {10 ** (2 * i): {"triton": t, "cuda": c} for i, (t, c) in enumerate(pairs, 1)}

    assert choice.winners(times((1.0, 1.0), (1.0, 0.96), (1.0, 2.0))) == ()
    assert choice.winners(times((1.0, 0.5), (1.0, 0.9))) == ((0, "cuda"),)
    assert choice.winners(times((1.0, 0.5), (1.0, 1.5))) == ((0, "cuda"), (1000, "triton"))
    assert choice.winners(times((1.0, 2.0), (1.0, 0.5))) == ((0, "triton"), (1000, "cuda"))
    assert choice.winners({5: {"cuda": 1.0}}) == ((0, "cuda"),) and choice.winners({5: {"triton": 1.0}}) == ()


def test_the_patch_applies_and_is_the_table(tmp_path):
    table = tmp_path / choice.TABLE
    table.parent.mkdir(parents=True)
    table.write_text((ROOT / choice.TABLE).read_text())
    chosen = {"gae": ((0, "cuda"),), "token_logprobs": ((0, "triton"), (1000, "cuda"))}
    (tmp_path / "x.patch").write_text(choice.patch_of(chosen))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", "x.patch"], cwd=tmp_path, check=True)
    namespace = {}
    exec(table.read_text(), namespace)
    assert '"gae": ((0, "cuda"),),\n' in table.read_text()
    assert namespace["FASTEST"] == chosen and "Not measured" not in table.read_text()
    assert choice.patch_of({}) == ""


def test_the_table_decides_by_size_on_a_gpu_alone(monkeypatch):
    from rlhf_fast.ops import dispatch

    monkeypatch.setitem(dispatch.OWN, "cuda", "triton")
    monkeypatch.setattr(dispatch, "FASTEST", {"gae": ((0, "triton"), (1000, "cuda")), "whiten": ((0, "cuda"),)})
    monkeypatch.setattr(dispatch, "KERNELS", {"triton": {"gae": 1, "whiten": 1}, "cuda": {"gae": 1}, "cpu": {"gae": 1}})
    assert [dispatch._chosen("gae", "cuda", n) for n in (0, 999, 1000)] == ["triton", "triton", "cuda"]
    assert dispatch._chosen("gae", "cpu", 1000) == "cpu" and dispatch._chosen("whiten", "cuda", 5) == "triton"
    with dispatch.backend("triton"):
        assert dispatch._chosen("gae", "cuda", 1000) == "triton"


def wheel(directory, name, version, *needs):
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_only_missing_wheels_are_fetched_and_what_they_need(tmp_path):
    have = "\n".join(text.replace(">=", "==").partition(",")[0] for text in wheels.NEEDED if "==" not in text)
    have = wheels.installed(have.replace("torch==2.11", "torch @ file:///torch.whl") + "\naccelerate 1.2\ndill==0.1\n")
    assert have["torch"] == "" and have["accelerate"] == "1.2" and have["transformers"] == "5.17"
    shelf = {
        "trl": ("1.16.0", ["datasets>=3", "accelerate", "torch<2", "vllm; extra == 'vllm'"]),
        "liger-kernel": ("0.8.5", ["triton"]),
        "datasets": ("4.0", ["dill<0.4,>=0.3", "tomli; python_version < '3.11'"]),
        "dill": ("0.3.9", []),
        "torch": ("1.9", []),
    }
    asked = []

    def download(requirement, directory, python, machine):
        asked.append(str(requirement))
        wheel(directory, requirement.name.replace("-", "_"), *[shelf[requirement.name][0]], *shelf[requirement.name][1])

    fetched = wheels.fetch(tmp_path, have, "3.12", download=download)
    assert fetched == ["trl==1.16.0", "liger-kernel==0.8.5", "datasets==4.0", "dill==0.3.9"]
    assert asked == ["trl==1.16.0", "liger-kernel==0.8.5", "datasets>=3", "dill<0.4,>=0.3"]


def test_the_list_of_packages_has_the_project_s_own_bounds():
    text = (ROOT / "pyproject.toml").read_text()
    for needed in wheels.NEEDED:
        assert f'"{needed}"' in text or f'"{needed};' in text or needed in ("triton", "packaging"), needed


def test_what_the_sanitizer_s_stand_in_runs_is_the_command_itself(tmp_path):
    (tmp_path / "out").mkdir()
    line = sanitizer.command(sanitizer.stand_in(tmp_path), "memcheck")
    assert line[1:3] == ["--tool", "memcheck"] and line[6:8] == ["86", sys.executable]
    done = subprocess.run([*line[:8], "-c", "import sys; print(7); sys.exit(3)"], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == "7\n========= ERROR SUMMARY: 0 errors\n"
    for test in sanitizer.TESTS:
        file, _, name = test.partition("::")
        assert f"def {name.split('::')[-1]}(" in (ROOT / file).read_text()


@pytest.mark.parametrize(
    "given, message",
    [
        (["--parts", "ops,op"], "--parts: expected some of build, smoke, .*, got 'op'"),
        (["--minutes", "0"], "--minutes: expected a number above 0, got 0"),
        (["--wheels", "x"], "--wheels, --have: expected both"),
        (["--dry-run"], "--out: expected a file with --dry-run"),
    ],
)
def test_a_command_line_that_is_wrong(given, message, capsys):
    with pytest.raises(SystemExit):
        command.arguments(given)
    assert re.search(message, capsys.readouterr().err)
