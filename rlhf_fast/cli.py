"""The `rlhf-fast` command: one sub-command per stage, whose flags and YAML keys are the fields of the stage's config.

The training stages come from the table in `rlhf_fast.methods`. Exit codes: 0 done, 1 the stage failed, 2 the config is
wrong, 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP. torch is imported when a stage runs.
"""

import io
import os
import sys
from typing import Any, NamedTuple

import rlhf_fast
from rlhf_fast.methods import METHODS, STAGES, load
from rlhf_fast.training import ending
from rlhf_fast.training.console import outlast, shown
from rlhf_fast.training.stopped import Stopped


class Command(NamedTuple):
    """A sub-command. It runs the function `run` on an object of the class `config`."""

    config: str  # package.module:dataclass
    run: str  # package.module:function of the config
    help: str
    first: str = ""  # the field that a first argument without a flag fills in


def _stage(name: str) -> Command:
    return Command(STAGES[name].config, STAGES[name].train, STAGES[name].help)


COMMANDS = {
    "demo": Command(
        "config:DemoConfig", "lab.demo:run", "five methods on a small world made on the spot, with a report"
    ),
    "pipeline": Command(
        "config:PipelineConfig", "report.pipeline:run", "SFT, reward model and every method, with a report"
    ),
    "init": Command("config:InitConfig", "stages.init:init", "train a tokenizer and make a model from a config"),
    "data": Command(
        "config:DataConfig", "report.doctor:run", "show a file's rows as training will see them", first="data"
    ),
    "sft": _stage("sft"),
    "pairs": Command("config:PairsConfig", "stages.pairs:sample", "sample preference pairs and label them by a reward"),
    "reward": _stage("reward"),
    **{name: _stage(name) for name in METHODS},
    "vllm-command": Command(
        "config:VLLMCommandConfig",
        "rollout.vllm.command:run",
        "print how to start a vLLM server for a stage",
    ),
    "compare": Command(
        "lab.compare.config:CompareConfig", "lab.compare.command:run", "methods side by side: time, memory, reward"
    ),
    "report": Command("config:ReportConfig", "report.runs:run", "an HTML report of any runs", first="dirs"),
    "watch": Command(
        "config:WatchConfig", "report.watch:run", "the curves of a running run in the terminal", first="dir"
    ),
    "card": Command("config:CardConfig", "report.card:run", "a model card from a finished run", first="dir"),
    "study exact": Command(
        "lab.study.config:ExactStudyConfig",
        "lab.study.exact_frontier:run",
        "every method against the exact reward-KL frontier",
    ),
    "study frontier": Command(
        "lab.study.config:FrontierConfig",
        "lab.study.frontier:run",
        "true reward against KL, every method at several strengths",
    ),
    "study winrate": Command(
        "lab.study.config:WinRateConfig", "lab.study.winrate:run", "every method against every other one"
    ),
    "study temperature": Command(
        "lab.study.config:TemperatureConfig", "lab.study.temperature:run", "win rate over the sampling temperature"
    ),
    "study convergence": Command(
        "lab.study.config:ConvergenceConfig", "lab.study.convergence:run", "win rate over training steps and seconds"
    ),
    "study shift": Command(
        "lab.study.config:ShiftConfig", "lab.study.shift:run", "the policies on another domain's prompts"
    ),
    "study variance": Command(
        "lab.study.config:VarianceStudyConfig",
        "lab.study.variance:run",
        "gradient variance of REINFORCE, ReMax, RLOO and a value model",
    ),
    "plan": Command(
        "plan.config:PlanConfig", "plan.command:run", "memory of a run before it is started, by role and phase"
    ),
    "bandit linear": Command(
        "lab.bandit.config:LinearBanditConfig",
        "lab.bandit.command:linear",
        "DPO against RMB-PO where the optimum is known",
    ),
    "bandit neural": Command(
        "lab.bandit.config:NeuralBanditConfig",
        "lab.bandit.command:neural",
        "DPO against RMB-PO with networks for rewards and policies",
    ),
}


SEVERAL = {*STAGES, "pairs", "pipeline", "plan", "compare"}
"""Commands that run in several processes."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. argv: default: the arguments of the process, which it then is."""
    if argv is None:
        outlast()
        with ending.signals():
            return _run(sys.argv[1:])
    return _run(argv)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview("", list(COMMANDS)))
        return 0
    if argv[0] == "--version":
        print(f"rlhf-fast {rlhf_fast.__version__}")
        return 0
    from rlhf_fast.config.arguments import nearest, parse

    group = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if group and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        print(_overview(argv[0], group))
        return 0
    words = 2 if group else 1
    name, arguments = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS and group:
        known = [command.split()[1] for command in group]
        return _fail(f"{argv[0]}: expected one of {', '.join(known)}, got {nearest(argv[1], known)}", 2)
    if name not in COMMANDS:
        return _fail(f"unknown command {nearest(name, list(COMMANDS))}", 2)
    if processes() > 1:
        if name not in SEVERAL:
            return _fail(f"{name}: expected one process, got {processes()}; start it without torchrun", 2)
        if os.environ.get("RANK") != "0":
            sys.stdout = io.StringIO()  # the first process says what there is to say
    command = COMMANDS[name]
    if command.first and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{command.first}", *arguments]
    debug, dry_run = "--debug" in arguments, "--dry-run" in arguments
    try:
        title = f"{name} {command.first.upper()}" if command.first else name
        parsed = parse(load(command.config), arguments, f"rlhf-fast {title}")
    except ValueError as error:
        if debug:
            raise
        return _fail(str(error), 2)
    if parsed is None:
        return 0
    try:
        if dry_run:
            load("plan.command:dry_run")(name, parsed)
            return 0
        load(command.run)(parsed)
    except (ValueError, OSError, Stopped) as error:
        if debug:
            raise
        where = ""
        if isinstance(error, OSError) and error.errno and not error.filename and str(error).startswith("[Errno"):
            where = f"{_written(parsed)}: "  # writes that fail half-way, as on a full disk, name no file
        return _fail(f"{where}{error} (--debug shows where)", 1)
    except Exception:
        if _failed_before():
            return 1
        raise
    except KeyboardInterrupt as error:
        return _fail(str(error) or f"interrupted; {_left(name)}", 130)
    except ending.Ended as error:
        return _fail(error.line or f"{error}; {_left(name)}", 128 + error.signum)
    if written := _written(parsed):
        print(shown(f"{name}: wrote {written}"))
    return 0


def _written(config: Any) -> str | None:
    """The file or directory that a command writes."""
    return next((getattr(config, key) for key in ("output_dir", "output", "out") if hasattr(config, key)), None)


def _left(command: str) -> str:
    """What a command leaves that a signal ended outside of a run."""
    if command in ("pipeline", "demo", "compare"):
        return "--resume goes on with what is not finished"
    if command.startswith("study"):
        return "the same command goes on with what is not finished"
    return "this command took no step" if command in STAGES else "nothing was written"


def _fail(message: str, code: int) -> int:
    if _failed_before():
        return code
    if processes() > 1:
        message = f"process {os.environ.get('RANK')} of {processes()}: {message}"
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}rlhf-fast: {shown(' '.join(message.split()))}{plain}", file=sys.stderr)
    return code


def processes() -> int:
    """The number of processes that a launcher such as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _failed_before() -> bool:
    """Whether another process of this run has failed before this process did, and has said so."""
    if processes() == 1:
        return False
    from rlhf_fast.failing import first_to_fail

    return not first_to_fail()


def _overview(group: str, names: list[str]) -> str:
    """The help text with these commands, which are all commands or a group's."""
    commands = "\n".join(f"  {name:<17} {COMMANDS[name].help}" for name in names)
    command = f"rlhf-fast {group} COMMAND" if group else "rlhf-fast COMMAND"
    return f"""usage: {command} [--config FILE] [flags]

RLHF post-training of language models on one machine.

commands:
{commands}

`{command} --help` lists its flags. `rlhf-fast --version` prints {rlhf_fast.__version__}."""


if __name__ == "__main__":
    sys.exit(main())
