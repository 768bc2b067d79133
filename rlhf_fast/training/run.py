"""The run around a stage's loop of steps.

`Run` numbers the steps, times phases, logs, evaluates, writes checkpoints and resumes. At the end it writes the model
and `run.json`.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_fast
from rlhf_fast.config import StageConfig
from rlhf_fast.config.fields import describe
from rlhf_fast.data.files import write_json
from rlhf_fast.failing import gone
from rlhf_fast.failing import lost as lost_process
from rlhf_fast.lm.sharding import is_part
from rlhf_fast.methods import load
from rlhf_fast.ranks import current
from rlhf_fast.threads import crowded
from rlhf_fast.training import checkpoint, ending
from rlhf_fast.training.batches import seed_everything
from rlhf_fast.training.ending import Ended
from rlhf_fast.training.evaluation import Evaluation
from rlhf_fast.training.fingerprint import fingerprints
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import lost
from rlhf_fast.training.memory import static_bytes
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.metrics import MetricsLogger, is_metrics
from rlhf_fast.training.resume import MADE_OF, REWARD_FAILED, RUN_CONFIG, resume_directory, state_in
from rlhf_fast.training.stopped import Diverged, is_by_reward
from rlhf_fast.training.trackers import trackers


class Run:
    """The run of one stage, as a context manager: numbering, phases, logging, checkpoints, final save.

    learners: role -> learner. The model of the first learner is the stage's product and is saved at the top of
        output_dir; every other model is saved in a folder named by its role.
    frozen: role -> model that is only read; the memory figures count it.
    states: name -> another object with state_dict and load_state_dict that a checkpoint must carry.
    evaluator: called with the product before the first step, after the last, and after every config.eval_steps steps.
    show: metrics shown in the progress bar.
    listeners: who hears of every row of metrics. TensorBoard is added where the config asks for it.
    Entering raises ValueError where output_dir holds another program's model or an unfinished run that `resume` does
    not continue, and where a model or the tokenizer cannot be saved.
    With several processes the first process writes and speaks.
    A run that an exception ends writes a checkpoint of its last good step, from which `resume` goes on. A run that a
    signal ends does so as `ending` says.
    """

    def __init__(
        self,
        config: StageConfig,
        description: str,
        total_steps: int,
        *,
        learners: dict[str, Learner],
        tokenizer: PreTrainedTokenizerBase,
        frozen: Mapping[str, PreTrainedModel | None] | None = None,
        states: Mapping[str, Any] | None = None,
        evaluator: Callable[[PreTrainedModel], Evaluation] | None = None,
        show: tuple[str, ...] = (),
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.evaluator, self.ranks = evaluator, current()
        self.last_evaluation: Evaluation | None = None
        self.config, self.description, self.total_steps, self.show = config, description, total_steps, show
        self.learners, self.tokenizer = learners, tokenizer
        self.listeners = [*listeners, *(self._told() if self.ranks.first else [])]
        self._begun: list[Listener] = []
        self.frozen = {role: model for role, model in (frozen or {}).items() if model is not None}
        product, *others = learners
        self.models = {"": learners[product].model, **{role: learners[role].model for role in others}}
        self.in_shards = any(is_part(p) for learner in learners.values() for p in learner.parameters)
        self.meter = Meter(self.models[""].device)
        self.states = {**learners, **(states or {}), "meter": self.meter}
        self.described = describe(config)  # now, because a failure after the training would lose the model
        self.made_of = fingerprints(config)
        self.first_step, self.train_seconds, self._facts = 1, 0.0, {}
        self._good, self._finishing = 0, False  # the last step whose updates are complete
        self._schedules: dict[str, dict[str, Any]] = {}
        self._deferring = ExitStack()
        self._reward_failed = Path(config.output_dir, REWARD_FAILED)

    def _told(self) -> list[Listener]:
        """The listeners that the config names."""
        name = self.config.push_to_hub
        return [*trackers(self.config.track), *([load("report.hub:Hub")(name)] if name else [])]

    def __enter__(self) -> "Run":
        models, runs = checkpoint.MODEL_FILES | self.models.keys(), {checkpoint.FINISHED, "samples.json"}
        clash = sorted(checkpoint.foreign(self.config.output_dir) & (models | runs))
        resumes = self.config.resume and checkpoint.latest(self.config.output_dir) is not None
        if not resumes and not is_metrics(Path(self.config.output_dir, "metrics.jsonl")):
            clash.append("metrics.jsonl")
        if clash:
            what, found = "model" if models & {*clash} else "run", f"{', '.join(clash)} in {self.config.output_dir}"
            raise ValueError(f"output_dir: expected no {what} that another program wrote, found {found}")
        checkpoint.check_savable(self.models.values(), self.tokenizer)
        passed: list[str] = []
        earlier = ""
        resumed = resume_directory(self.config, passed.append)
        if resumed is not None:
            state = state_in(resumed, self.states)
            for name, part in self.states.items():
                part.load_state_dict(state[name])
            self.first_step, self.train_seconds = state["step"] + 1, state["train_seconds"]
            self._facts, earlier = state["facts"], state["metrics"]
            if passed:
                self._facts["resumed"] = [*self._facts.get("resumed", []), *passed]
        else:
            self.ranks.wait()  # because the other processes have to have looked for a checkpoint too
            if self.ranks.first:
                self._make_room()
        self.logger = MetricsLogger(
            self.config.output_dir,
            self.total_steps,
            description=self.description,
            resume_step=self.first_step - 1,
            earlier=earlier,
            show=self.show,
        )
        self.logger.__enter__()
        device = self.models[""].device
        slow = crowded(torch.get_num_threads(), self.ranks.beside) if device.type == "cpu" else ""
        for line in [*passed, *([slow] if slow else [])]:
            self.say(line)
        self._mark_good(self.first_step - 1)
        try:
            for listener in self.listeners:
                listener.begin(self)
                self._begun.append(listener)
        except BaseException as error:  # Python calls __exit__ only after an __enter__ that returns
            self._close(type(error), error, error.__traceback__)
            raise
        if self.config.resume and resumed is None:
            self.logger.say(f"{self.description}: no checkpoint to resume in {self.config.output_dir}, starts anew")
        self._deferring.enter_context(ending.after_the_step(self._kept))
        return self

    def _make_room(self) -> None:
        """Clears a finished run's files, so that none passes for a file of this run; refuses an unfinished run's."""
        checkpoint.check_no_unfinished(self.config.output_dir)
        checkpoint.clear(self.config.output_dir)
        self._reward_failed.unlink(missing_ok=True)
        Path(self.config.output_dir, checkpoint.FINISHED).unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._deferring.close()
        # Ctrl-C writes nothing, because the next run of the same command would find an unfinished run.
        if isinstance(error, Exception | Ended) and not self._finishing:
            self._keep_good_step(exactly=isinstance(error, Ended))
        if is_by_reward(error):
            with suppress(OSError):  # such as a directory that is gone
                self._reward_failed.touch()
        self._close(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            advice = "" if checkpoint.latest(self.config.output_dir) else " (SIGTERM saves before it ends a run)"
            error.args = (f"{self.description}: interrupted in step {self._good + 1}; {self._kept()}{advice}",)
        elif isinstance(error, Diverged):
            error.args = (f"{error}; {self._advice(error.remedy)}",)
        elif isinstance(error, Ended):
            error.line = f"{self.description}: ended by {ending.name(error.signum)}; {self._kept()}"
        elif error is not None and self.ranks.size > 1 and gone(error):  # a collective of a model in shards
            raise lost_process(error) from error
        elif error is None and (signum := ending.asked()) is not None:
            wrote = f"it was finished, and wrote {self.config.output_dir}"
            raise Ended(signum, f"{self.description}: ended by {ending.name(signum)}; {wrote}")

    def _close(self, *exc: Any) -> None:
        with ExitStack() as ending:  # a listener that raises keeps no other from its end
            for listener in reversed(self._begun):
                ending.callback(listener.end)
            self.logger.__exit__(*exc)

    def _mark_good(self, step: int) -> None:
        schedules = {role: learner.scheduler.state_dict() for role, learner in self.learners.items()}
        self._good, self._schedules = step, schedules  # together, because a signal may come in between

    def _kept(self) -> str:
        """What is on the disk, and how to go on."""
        kept = checkpoint.latest(self.config.output_dir)
        if kept is None:
            return "nothing is saved" + ("" if self.config.save_steps else ", because save_steps is 0")
        return f"{kept} is saved, and --resume goes on from there"

    def _advice(self, remedy: str) -> str:
        """How to go on after numbers that are not what they must be."""
        kept = checkpoint.latest(self.config.output_dir)
        return f"{self._kept()}; " + (f"with {remedy}, start anew with --model {kept}" if kept else f"try {remedy}")

    def _end_if_asked(self, step: int) -> None:
        """Where a signal has asked for the end, writes the state after `step` and raises Ended in every process."""
        # What all processes know; a signal that came after the last numbers of a step waits for the next step's.
        signum = ending.asked() if self.ranks.size == 1 else ending.heard()
        if signum is None:
            return
        ending.reached()
        new = step >= self.first_step and checkpoint.latest(self.config.output_dir) != self._state_at(step)
        if self.ranks.gather(new)[0]:
            self.save_state(step)
            if self.ranks.first:
                self._prune(step)
        self.ranks.wait()  # every process then says what is saved
        raise Ended(signum)

    def _keep_good_step(self, *, exactly: bool = False) -> None:
        """Writes the checkpoint of the last good step, if there is one, and says so.

        Where the broken step has made whole updates before, as several epochs of minibatches do, these are kept.
        exactly: writes nothing then, because the run that goes on would differ from one that was never broken off.
        """
        learners, good = self.learners.values(), self._good
        moved = any(self._schedules[role] != learner.scheduler.state_dict() for role, learner in self.learners.items())
        if good == 0 or not self.ranks.first:
            return
        if self.in_shards:  # other parts may be gone
            return
        if not all(learner.whole for learner in learners) or (exactly and moved):
            return
        place = self.config.output_dir
        if lost(place) or not Path(place).is_dir():  # somebody has taken it away; another run may have taken its place
            return
        if checkpoint.latest(self.config.output_dir) != self._state_at(good):
            try:
                for role, learner in self.learners.items():
                    learner.scheduler.load_state_dict(self._schedules[role])  # the step is taken again
                self.save_state(good)
                self._prune(good)
            except Diverged:  # the weights were broken before the error that ended the run, which says how to go on
                return
            except Exception as error:  # such as a full disk; the exception that ended the run matters more
                self.logger.say(f"{self.description}: no checkpoint of step {good} could be written: {error}")
                return
            updates = f", with updates of step {good + 1}" if moved else ""
            self.logger.say(f"{self.description}: wrote the state after step {good}{updates} to {self._state_at(good)}")
        if not exactly:  # the line of a signal says it
            self.logger.say(f"{self.description}: --resume goes on after step {good}")

    def steps(self) -> Iterator[int]:
        """Step numbers from 1 on, or from the checkpoint on. The global generators are seeded anew for each step."""
        if self.evaluator and self.first_step == 1:
            before = self._evaluate()
            self._log(0, {**before.metrics, "time/total": 0.0})
            if self.ranks.first:
                write_json(Path(self.config.output_dir) / "samples_before.json", before.samples)
            self.meter.step(counted=False)
        ending.hear(self.ranks.gather(ending.asked()))
        self._end_if_asked(self.first_step - 1)
        for step in range(self.first_step, self.total_steps + 1):
            seed_everything(self.config.seed, step)
            yield step

    def end_step(self, step: int, metrics: dict[str, float]) -> None:
        """Evaluates where it is due, logs the step with its times and peaks, writes a checkpoint where it is due."""
        self._mark_good(step)
        last = step == self.total_steps
        try:
            # every config that asks for an evaluator has eval_steps
            if self.evaluator and (last or step % (self.config.eval_steps or self.total_steps) == 0):  # pyright: ignore[reportAttributeAccessIssue]
                metrics = {**metrics, **self._evaluate().metrics}
        finally:  # a resumed run does not take this step again, so its numbers are logged in any case
            measured = self.meter.step()
            self.train_seconds += measured["time/step"] - measured.get("time/evaluation", 0.0)
            self._log(step, {**metrics, **measured, "time/total": self.train_seconds})
        if self.config.save_steps and step % self.config.save_steps == 0 and not last:
            self.logger.check_there()
            self.save_state(step)
            if self.ranks.first:
                self._prune(step)
        self._end_if_asked(step)

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        row = self.logger.log(step, metrics)
        for listener in self.listeners:
            listener.log(step, row)

    def save_state(self, step: int) -> None:
        """Writes the checkpoint from which a resumed run goes on after `step`. All processes call it."""
        if not (self.ranks.first or self.in_shards):
            return
        state = {name: part.state_dict() for name, part in self.states.items()}
        state |= {"step": step, "train_seconds": self.train_seconds, "facts": self._facts}
        state["metrics"] = self.logger.text
        files = {RUN_CONFIG: {**self.described, MADE_OF: self.made_of}}
        checkpoint.save(
            self._state_at(step),
            models=self.models,
            tokenizer=self.tokenizer,
            state=state,
            extra_files=files,
        )
        if self.ranks.first:
            self._reward_failed.unlink(missing_ok=True)

    def _prune(self, step: int) -> None:
        config = self.config
        limit, every = config.save_total_limit, config.save_steps
        checkpoint.prune(config.output_dir, limit, every=every, last=self.total_steps, after=step)

    def _state_at(self, step: int) -> Path:
        return Path(self.config.output_dir) / f"checkpoint-{step}"

    def _evaluate(self) -> Evaluation:
        assert self.evaluator is not None  # callers ask first
        with self.meter.phase("evaluation"):
            self.last_evaluation = self.evaluator(self.models[""])
        return self.last_evaluation

    def note(self, **facts: Any) -> None:
        """Keeps facts for run.json: data counts, truncations, evaluation results. Says where rows lost tokens.

        facts: `truncated_rows=2` beside `rows=100` prints that 2 of 100 rows are too long.
        """
        self._facts |= facts
        for name, count in facts.items():
            kind = name.removeprefix("truncated_")
            if kind != name and count:
                cut = f"{count} of {self._facts[kind]} {kind}"
                self.logger.say(f"{self.description}: {cut} are too long and were truncated")

    def say(self, line: str) -> None:
        """Prints a line about the run, above the bar where there is one."""
        self.logger.say(f"{self.description}: {line}")

    def finish(self) -> None:
        """Writes the trained models, run.json (config, versions, time, memory) and the last evaluation's samples."""
        if self.evaluator and self.last_evaluation is None:  # it raised an exception after the last step, before resume
            self._evaluate()
        self.logger.check_there()
        self._finishing = True
        phases, held = self.meter.summary(), self._static_bytes()
        processes = self.ranks.gather({"static_bytes": held, "phases": phases})
        if not (self.ranks.first or self.in_shards):
            self.ranks.wait()
            return
        several = {"processes": processes} if self.ranks.size > 1 else {}
        summary = {
            "stage": self.description,
            "config": self.described,
            "made_of": self.made_of,
            "steps": self.total_steps,
            "train_seconds": self.train_seconds,
            "phases": phases,
            "static_bytes": held,
            **several,
            "parameters": {
                role: sum(p.numel() for p in learner.model.parameters()) for role, learner in self.learners.items()
            },
            "trained_parameters": {
                role: sum(p.numel() for p in learner.parameters) for role, learner in self.learners.items()
            },
            **self._facts,
            "environment": environment(self.meter.device),
        }
        files: dict[str, Any] = {checkpoint.FINISHED: summary}
        if self.last_evaluation is not None:
            summary["evaluation"] = self.last_evaluation.metrics
            files["samples.json"] = self.last_evaluation.samples
        checkpoint.save(self.config.output_dir, models=self.models, tokenizer=self.tokenizer, extra_files=files)
        if self.ranks.first:
            self._reward_failed.unlink(missing_ok=True)
            checkpoint.tidy(self.config.output_dir)
        self.ranks.wait()  # a stage that reads the model starts when it is whole

    def _static_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of every role. Weights that several roles share belong to the first of these roles."""
        held = static_bytes({**{role: learner.model for role, learner in self.learners.items()}, **self.frozen})
        return {
            role: {**parts, **(self.learners[role].static_bytes if role in self.learners else {})}
            for role, parts in held.items()
        }


def environment(device: torch.device) -> dict[str, Any]:
    """The versions, device and threads that a run's figures depend on."""
    return {
        "rlhf_fast": rlhf_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
