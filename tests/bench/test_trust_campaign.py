"""The trust campaign: every kind counts a broken promise as lost, and a whole one as survived."""

import json
import os
import signal
from contextlib import nullcontext
from random import Random

import pytest
import torch
from safetensors.torch import save_file

import rlhf_fast
from bench.trust import (
    campaign,
    child,
    command,
    crashes,
    damage,
    disk,
    kills,
    mutations,
    ops,
    ranks,
    registry,
    reuse,
    rewards,
    rows,
    soak,
    two,
)
from bench.trust.equal import differences
from bench.trust.kind import Case, Kind, Lost
from bench.trust.op_calls import CALLS
from bench.trust.world import TARGETS, World
from rlhf_fast import cli
from rlhf_fast.methods import STAGES
from rlhf_fast.training import checkpoint, lock, metrics, resume


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The campaign's world, in a process of one thread, as the campaign has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield World(tmp_path_factory.mktemp("trust"))
    torch.set_num_threads(before)


@pytest.fixture
def forgetful(monkeypatch):
    """A resumed run forgets the metrics of the steps before."""
    forget(monkeypatch)


def forget(monkeypatch):
    begin = metrics.MetricsLogger.__init__

    def without(self, *arguments, earlier, **options):
        begin(self, *arguments, **options)

    monkeypatch.setattr(metrics.MetricsLogger, "__init__", without)


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def case(kind: Kind, world: World, name: str) -> Case:
    return next(one for one in kind.cases(world, name.rpartition("/")[0]) if one.name == name)


def lost(one: Case, directory, seed: int = 0) -> str:
    """What a try says that is lost."""
    with pytest.raises(Lost) as found:
        one.run(directory, Random(seed))
    return str(found.value)


def mutate(directory):
    """Eleven mutations, in all the ways that a run has."""
    (directory / "folder").mkdir()
    (directory / "a").write_text("four")
    with (directory / "a").open("a") as file:
        file.write("more")
    os.replace(directory / "a", directory / "folder" / "b")
    torch.save({"x": torch.zeros(100)}, directory / "state.pt")
    save_file({"x": torch.zeros(100)}, directory / "model.safetensors")
    (directory / "a").exists()
    (directory / "folder" / "b").unlink()
    (directory / "folder").rmdir()


EXPECTED = [
    "whole mkdir folder", "whole write a", "torn write a", "whole append a", "torn append a", "whole rename a",
    "whole save state.pt", "torn save state.pt", "whole save model.safetensors", "torn save model.safetensors",
    "whole remove folder/b", "whole rmdir folder",
]  # fmt: skip


def test_every_mutation_is_counted(tmp_path):
    ledger, root = tmp_path / "ledger", tmp_path / "root"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    begin = mutations.count(root, ledger)
    ended = child.run(lambda: (begin(), mutate(tmp_path / "elsewhere"), mutate(root), 0)[-1], tmp_path / "log")
    assert ended.code == 0, ended.output
    lines = [line.split(maxsplit=1)[1].replace(f"{root}/", "") for line in ledger.read_text().splitlines()]
    assert lines == EXPECTED
    assert mutations.number_of(ledger) == 12


@pytest.mark.parametrize(
    ("at", "left"), [(1, {}), (2, {}), (3, {"a": 0}), (5, {"a": 4}), (8, {"b": 8, "state.pt": 0.5})]
)
def test_a_crash_leaves_what_was_done_before(at, left, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    begin = mutations.crash(root, tmp_path / "ledger", at)
    ended = child.run(lambda: (begin(), mutate(root), 0)[-1], tmp_path / "log")
    assert ended.code == -signal.SIGKILL
    sizes = {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    torch.save({"x": torch.zeros(100)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").stat().st_size
    assert sizes == {name: whole // 2 if size == 0.5 else size for name, size in left.items()}


def test_processes_that_a_run_starts_are_counted_too(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'open(\"{root}/b\", \"w\")'], check=True)"

    def action():
        mutations.count(root, tmp_path / "ledger")()
        (root / "a").touch()
        exec(start)

    assert child.run(action, tmp_path / "log").code == 0
    assert mutations.number_of(tmp_path / "ledger") == 4


def test_a_child_says_how_it_ended(tmp_path):
    def leave(code):
        raise SystemExit(code)

    assert child.run(lambda: None, tmp_path / "0").code == 0
    assert child.run(lambda: leave(7), tmp_path / "1").code == 7
    raised = child.run(lambda: 1 // 0, tmp_path / "2")
    assert (raised.code, raised.last) == (1, "ZeroDivisionError: integer division or modulo by zero")
    assert child.run(die, tmp_path / "3").code == -signal.SIGKILL
    grown = child.run(lambda: len(bytearray(2 * child.MEMORY)), tmp_path / "5")
    assert (grown.code, grown.last) == (1, "MemoryError")
    with pytest.raises(Lost, match="still runs after 0 s"):
        child.run(signal.pause, tmp_path / "4", 0.1)


def test_differences(tmp_path):
    for name, loss, seconds, extra in (("a", 0.5, 1.0, False), ("b", 0.25, 2.0, True)):
        root = tmp_path / name
        root.mkdir()
        row = {"step": 1, "loss": loss, "learning_rate": 0.1, "time/step": seconds}
        (root / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (root / "run.json").write_text(json.dumps({"config": {"output_dir": str(root), "data": f"{root}/x"}}))
        save_file({"x": torch.full((3,), loss)}, root / "model.safetensors")
        if extra:
            (root / ".rlhf_fast-writing-x").mkdir()
    assert differences(tmp_path / "a", tmp_path / "a") == []
    assert differences(tmp_path / "a", tmp_path / "b") == [
        ".rlhf_fast-writing-x is missing",
        "metrics.jsonl: [0].loss is '0.5', expected '0.25'",
        "model.safetensors: other content",
    ]


def test_reports_are_equal_but_for_what_was_measured(tmp_path):
    for name, seconds, peak, number in (("a", 0, 100, 16), ("b", 1, 200, 16), ("c", 0, 100, 17)):
        (tmp_path / name).mkdir()
        notes = [f"SFT from {tmp_path / name}/model on {number} rows in {seconds} s"]
        report = {"notes": notes, "processes": {"peaks": [{"process": 0, "scores": peak}]}}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert len(differences(tmp_path / "a", tmp_path / "c")) == 1


def test_parts_of_a_state_are_equal_in_any_order_of_a_headers_keys(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    contents = [
        ({"x": entry}, b"0000"),
        ({"x": dict(reversed(entry.items()))}, b"0000"),
        ({"x": entry}, b"0001"),
        ({"y": entry}, b"0000"),
    ]
    for name, (header, numbers) in zip("abcd", contents, strict=True):
        (tmp_path / name / "state").mkdir(parents=True)
        text = json.dumps(header).encode()
        whole = len(text).to_bytes(8, "little") + text + numbers
        (tmp_path / name / "state" / "shard-00001.safetensors").write_bytes(whole)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    for name in "cd":
        assert differences(tmp_path / "a", tmp_path / name) == ["state/shard-00001.safetensors: other content"]


def test_crashes(world, tmp_path, monkeypatch):
    places = world.baseline("sft").mutations
    assert places > 60
    crashes.crashed(world, "sft", tmp_path / "whole", (places * 2 // 3, places // 3))
    forget(monkeypatch)
    said = lost(case(crashes.KIND, world, f"sft/{places * 2 // 3}"), tmp_path / "broken")
    assert "but metrics.jsonl" in said


def test_crashes_count_what_is_left_over(world, tmp_path, monkeypatch):
    ledger = (world.baseline("sft").directory.parent / "ledger").read_text().splitlines()
    place = max(i for i, line in enumerate(ledger, 1) if "whole remove" in line and "deleting-checkpoint-1" in line)
    monkeypatch.setattr(lock, "sweep", lambda directory: None)
    assert "is left over" in lost(case(crashes.KIND, world, f"sft/{place}"), tmp_path)


def test_kills(world, tmp_path, forgetful, monkeypatch):
    class Killed(child.Child):
        waited = False

        def ended(self, seconds):  # the moment is that of the second checkpoint, not one of the clock
            if self.waited:
                return super().ended(seconds)
            self.waited = True
            while not (tmp_path / "out" / "checkpoint-2").exists():
                assert not super().ended(0.001)
            return False

    monkeypatch.setattr(kills, "Child", Killed)
    monkeypatch.setattr(kills, "_KINDS", (signal.SIGKILL,))
    said = lost(Case("", lambda directory, rng: kills.killed(world, "sft", directory, rng, 1.0)), tmp_path)
    assert "metrics.jsonl" in said


def test_two(world, tmp_path, monkeypatch):
    two.same(world, "sft", tmp_path / "whole", Random(0))
    monkeypatch.setattr("fcntl.flock", lambda *arguments: (_ for _ in ()).throw(BlockingIOError()))
    assert "expected one run to finish" in lost(case(two.KIND, world, "sft/other 0"), tmp_path)
    with pytest.raises(Lost, match="expected one line about output_dir"):
        two._told([child.Ended(1, "FileExistsError: .checkpoint-2.new", 0.0)])


class Early(Random):
    """Kills process 1 when process 0 has come to a third of its changes of the file system."""

    def choice(self, options):
        return "beside"

    def randint(self, first, last):
        return (first + last) // 3


def test_ranks(world, tmp_path, monkeypatch):
    ranks.killed(world, "sft", tmp_path / "whole", Early())
    ranks.failed(world, "sft", tmp_path / "failed", Random(0), "memory", 1)
    monkeypatch.setattr("rlhf_fast.failing._ended", lambda: [])
    with pytest.raises(
        Lost, match="expected exit code 1 and that process 1 has ended, got exit code 1 .*another process"
    ):
        ranks.killed(world, "sft", tmp_path / "unnamed", Early())


def test_disk(world, tmp_path, monkeypatch):
    size = disk._bytes(world.baseline("sft").directory) // 2
    monkeypatch.setattr(cli, "_fail", lambda message, code: code)
    with pytest.raises(Lost, match="expected one line about the full disk"):
        disk.full(world, "sft", tmp_path, size, mount=False)


def test_damage(world, tmp_path, monkeypatch):
    load = checkpoint.load_state
    monkeypatch.setattr(checkpoint, "load_state", lambda path: damage._moments(load(path), lambda x: 2 * x))
    said = lost(case(damage.KIND, world, "sft/flip metrics.jsonl"), tmp_path / "a")
    assert "another result in silence" in said or "metrics" in said
    monkeypatch.setattr(checkpoint, "load_state", die)
    assert "death by signal 9" in lost(case(damage.KIND, world, "sft/state fp16"), tmp_path / "b")


def test_reuse(world, tmp_path, monkeypatch):
    one = case(reuse.KIND, world, "sft/model, interrupted")
    monkeypatch.setattr(resume, "fingerprints", lambda config: {})
    assert "model: exit code 0, but not the results of an empty directory" in lost(one, tmp_path)


def test_rows(world, tmp_path, monkeypatch):
    case(rows.KIND, world, "sft/no JSON").run(tmp_path / "whole", Random(0))
    monkeypatch.setattr(cli, "_fail", lambda message, code: code)
    assert "expected one line, got exit code" in lost(case(rows.KIND, world, "sft/half a line"), tmp_path / "broken")


def test_rewards(world, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_fail", lambda message, code: code)
    assert "expected one line, got exit code" in lost(case(rewards.KIND, world, "remax/raises"), tmp_path)


def test_ops(world, tmp_path, monkeypatch):
    right = rlhf_fast.whiten
    case(ops.KIND, world, "whiten/valid 0").run(tmp_path / "whole", Random(0))
    off = lambda x, mask, **options: right(x, mask, **options) * (1 if x.dtype == torch.float64 else 1.01)  # noqa: E731
    monkeypatch.setattr(rlhf_fast, "whiten", off)
    assert "whiten: result 0 of x=" in lost(case(ops.KIND, world, "whiten/valid 0"), tmp_path / "off")
    monkeypatch.setattr(rlhf_fast, "whiten", die)
    assert "expected no signal, got 9 in call 0" in lost(case(ops.KIND, world, "whiten/special 0"), tmp_path / "signal")
    monkeypatch.setattr(rlhf_fast, "whiten", lambda x, mask, **options: x.no_such_thing)
    assert "AttributeError instead of ValueError" in lost(
        case(ops.KIND, world, "whiten/corrupted 0"), tmp_path / "error"
    )


def test_soak():
    seen, steps = [(400.0, 4, 3)] * 12, [0.01] * 12
    soak.judge(seen, steps)
    for place, name in enumerate(("MiB of resident memory", "open files", "threads")):
        grown = [tuple(x + 10 * (i > 7) * (p == place) for p, x in enumerate(one)) for i, one in enumerate(seen)]
        with pytest.raises(Lost, match=f"{name} grew"):
            soak.judge(grown, steps)
    with pytest.raises(Lost, match=r"seconds of a step grew from 0\.0100 to 0\.0400"):
        soak.judge(seen, [*steps[:7], *[0.04] * 5])
    assert soak.look(os.getpid())[0] > 50


def made(directory, rng):
    (directory / "what").write_text(str(rng.random()))
    raise Lost("gone")


def two_cases(world, target):
    return [Case(f"{target}/good", lambda directory, rng: None), Case(f"{target}/bad", made)]


FAKE = Kind("breaks", ("a", "b"), ("a",), two_cases)


@pytest.mark.parametrize(("options", "tries"), [({}, 4), ({"seconds": 60.0}, 4), ({"seconds": 60.0, "quick": True}, 2)])
def test_a_campaign_counts_and_keeps_what_is_lost(options, tries, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "World", lambda root: nullcontext())
    found = campaign.conduct({"fake": FAKE}, tmp_path, seed=3, keep=tmp_path / "kept", **options)["fake"]
    assert (found.tries, len(found.losses)) == (tries, tries // 2)
    loss = next(one for one in found.losses if one["case"] == "a/bad")
    assert loss["said"] == "gone"
    assert loss["command"] == 'python -m bench trust --only fake --case "a/bad" --seed 3 --keep DIR'
    assert float((tmp_path / "kept" / "fake-a-bad" / "what").read_text()) == Random("3/fake/a/bad").random()
    again = campaign.conduct({"fake": FAKE}, tmp_path, seed=3, case="a/bad", keep=tmp_path / "again")["fake"]
    assert (again.tries, len(again.losses)) == (1, 1)
    table = campaign.rows({"fake": FAKE}, {"fake": found})
    assert table[-1] == {"kind": "all", "what": "", "tries": tries, "survived": tries // 2, "lost": tries // 2}
    assert not list(tmp_path.glob("fake-*")), "the directories of tries are gone"


def test_so_many_tries_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "World", lambda root: nullcontext())
    found = campaign.conduct({"fake": FAKE}, tmp_path, seed=3, tries=3)["fake"]
    assert found.tries == 3 and set(found.targets) == {"a", "b"}


def test_the_command_exits_1_on_a_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(campaign, "World", lambda root: nullcontext())
    monkeypatch.setattr(command, "KINDS", {"fake": FAKE})
    monkeypatch.setattr(command, "warm", lambda: None)
    threads = torch.get_num_threads()
    try:
        assert command.main(["--out", str(tmp_path / "trust.json")]) == 1
        assert "LOST fake a/bad: gone" in capsys.readouterr().out
        assert json.loads((tmp_path / "trust.json").read_text())["table"][-1]["lost"] == 2
        assert command.main(["--only", "fake", "--case", "a/good"]) == 0
        with pytest.raises(SystemExit, match="--only: expected some of fake, got 'other'"):
            command.main(["--only", "other"])
        with pytest.raises(SystemExit, match="2"):
            command.main(["--quick", "--minutes", "3"])
    finally:
        torch.set_num_threads(threads)


def test_what_is_covered():
    assert list(registry.KINDS) == [
        "crashes", "kills", "two", "ranks", "disk", "damage", "reuse", "rows", "rewards", "ops", "soak",
    ]  # fmt: skip
    assert set(STAGES) <= set(TARGETS)
    public = {name for name in rlhf_fast.__all__ if name[0].islower()}
    assert set(CALLS) == public
    for kind in registry.KINDS.values():
        assert kind.quick and kind.targets and kind.help
