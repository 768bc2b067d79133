"""`rlhf-fast report`: an HTML report of any runs, also of runs that have not ended."""

from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.config import ReportConfig
from rlhf_fast.data.damage import read_json
from rlhf_fast.methods import STAGES
from rlhf_fast.report.pipeline import machine, reward_name_of
from rlhf_fast.report.plots import MethodRun
from rlhf_fast.report.report import load_run, write_report

METRICS = "metrics.jsonl"


def run(config: ReportConfig) -> None:
    """Writes the report of the runs in `config.dirs`, which have to be there."""
    directories = find_runs(config.dirs)
    runs = load_runs(directories)
    before = _samples_before(directories, runs)
    title = config.title or ", ".join(run.name for run in runs)
    write_report(
        config.output,
        runs,
        title=title,
        samples=before,
        notes=_notes(directories, runs),
        reward_name=_reward_name(runs),
        start="start",
    )


def write_one(directory: Path) -> None:
    """Writes report.html and report.json of the run in `directory` into it."""
    run(ReportConfig(dirs=[str(directory)], output=str(directory / "report.html")))


def find_runs(directories: Sequence[str], name: str = "dirs") -> list[Path]:
    """The directories of runs, in order: a directory with metrics.jsonl, else its folders that have one.

    name: the argument's name. Raises ValueError where there is no run.
    """
    found: dict[Path, None] = {}
    for given in directories:
        directory = Path(given)
        if (directory / METRICS).is_file():
            found[directory] = None
            continue
        inside = sorted((path.parent for path in directory.glob(f"*/{METRICS}")), key=_place)
        if not inside:
            what = "a folder without it" if directory.is_dir() else "no directory"
            raise ValueError(f"{name}: expected a directory with {METRICS}, or a folder of them, got {given}, {what}")
        found |= dict.fromkeys(inside)
    return list(found)


def _place(directory: Path) -> tuple[int, str]:
    """The stages in the order of the table, then other names."""
    names = list(STAGES)
    return (names.index(directory.name) if directory.name in names else len(names)), directory.name


def load_runs(directories: Sequence[Path]) -> list[MethodRun]:
    """The runs of these directories, each with a name of its own: its stage's title, else its directory too.

    Raises ValueError where a run has not written a row yet.
    """
    titles = {directory: _title(directory) for directory in directories}
    runs = []
    for directory, title in titles.items():
        alone = list(titles.values()).count(title) == 1
        name = title if alone else f"{title} ({_short(directory, directories)})"
        runs.append(_loaded(name, directory))
    return runs


def _loaded(name: str, directory: Path) -> MethodRun:
    if not (directory / METRICS).read_bytes().strip():
        raise ValueError(f"dirs: expected rows in {directory / METRICS}, found none yet")
    return load_run(name, directory)


def _title(directory: Path) -> str:
    """The title of the stage that wrote the directory; of a run that has not ended, by the directory's name."""
    if (directory / "run.json").is_file():
        return read_json(directory / "run.json").get("stage", directory.name)
    return STAGES[directory.name].title if directory.name in STAGES else directory.name


def _short(directory: Path, among: Sequence[Path]) -> str:
    """The end of the path that no other path has."""
    parts = directory.resolve().parts
    others = [path.resolve().parts for path in among if path != directory]
    for count in range(1, len(parts) + 1):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return str(directory)


def _samples_before(directories: Sequence[Path], runs: Sequence[MethodRun]) -> list:
    """The start's completions, where all runs with samples have the same; else none, and gains are not paired."""
    found = [
        read_json(directory / "samples_before.json", list)
        for directory, run in zip(directories, runs, strict=True)
        if run.samples and (directory / "samples_before.json").is_file()
    ]
    sampled = [run for run in runs if run.samples]
    prompts = [[row["prompt"] for row in run.samples] for run in sampled]
    same = len(found) == len(sampled) and all(rows == found[0] for rows in found)
    return found[0] if found and same and all(p == prompts[0] for p in prompts) else []


def _reward_name(runs: Sequence[MethodRun]) -> str:
    """The name of the evaluations' reward, where all evaluated runs have the same; else "reward"."""
    names = {
        reward_name_of(config.get("eval_reward") or config.get("reward"))
        for run in runs
        if run.evaluations and (config := run.record.get("config"))
    }
    return names.pop() if len(names) == 1 else "reward"


def _notes(directories: Sequence[Path], runs: Sequence[MethodRun]) -> list[str]:
    """Where the runs lie, which of them have not ended, and the machines."""
    places = ", ".join(f"{run.name}: {directory}" for directory, run in zip(directories, runs, strict=True))
    notes = [f"{places}."]
    if running := [run.name for run in runs if not run.record]:
        notes.append(f"No run.json, because the run has not ended: {', '.join(running)}.")
    machines = dict.fromkeys(machine(run.record) for run in runs if "environment" in run.record)
    return [*notes, *machines]
