"""What every stage's training shares: the optimizer of one model, and the run around a loop of steps.

`Learner` turns micro-batch losses into one optimizer step. `Run` numbers the steps, times phases, logs, writes
checkpoints, resumes and leaves the final model with a `run.json` beside it. The stages write the loop itself.
"""

import hashlib
import json
import math
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rlhf_fast
from rlhf_fast.config import OfflineConfig, OnlineConfig, StageConfig
from rlhf_fast.config.fields import describe
from rlhf_fast.data.encoding import epoch_batches
from rlhf_fast.lm import adapters
from rlhf_fast.lm.models import load_policy
from rlhf_fast.training import checkpoint
from rlhf_fast.training.memory import Meter, static_bytes
from rlhf_fast.training.metrics import MetricsLogger
from rlhf_fast.training.optimizers import lr_factor, make_optimizer

_RUN_CONFIG = "run_config.json"  # in every checkpoint
_MAY_CHANGE = {  # when a run goes on: where it writes, what it shows, how it fits into memory
    "output_dir",
    "resume",
    "save_steps",
    "eval_steps",
    "tensorboard",
    "micro_batch_size",
    "gradient_checkpointing",
    "offload",
    "max_logprob_drift",
}


class Learner:
    """One trained model with its optimizer, learning-rate schedule, clipping and autocast.

    parameters: what it trains; default: all parameters of `model` that require gradients. With optimizer_in_backward
    the weights move during backward, and `step` only closes the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: StageConfig,
        total_steps: int,
        *,
        learning_rate: float | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.model, self.max_grad_norm, self.bf16 = model, config.max_grad_norm, config.bf16
        self.static_bytes: dict[str, int] = {}
        self.parameters = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
        self.optimizer = make_optimizer(config, self.parameters, learning_rate or config.learning_rate)
        factor = lr_factor(config.lr_schedule, config.warmup_steps, total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.in_backward, self.norms = config.optimizer_in_backward, []
        if self.in_backward:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._step_in_backward)
        if config.gradient_checkpointing:
            checkpoint_activations(model)

    def autocast(self) -> torch.autocast:
        return autocast(self.model.device, self.bf16)

    def _step_in_backward(self, parameter: nn.Parameter) -> None:
        self.norms.append(parameter.grad.norm())
        self.optimizer.step()  # of this parameter: no other has a gradient at this moment
        parameter.grad = None

    def step(self) -> float:
        """Apply the accumulated gradients and clear them; returns their norm before clipping."""
        if self.in_backward:
            norm, self.norms = torch.stack(self.norms).norm(), []
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            left = "spoilt, resume from a checkpoint" if self.in_backward else "left as they are"
            raise RuntimeError(f"gradient norm is {norm.item()}; the weights were {left}")
        if not self.in_backward:
            self.optimizer.step()
        if not self.static_bytes:  # the one moment when gradients and optimizer states both exist
            held = static_bytes({"": nn.ParameterList(self.parameters)}, {"": self.optimizer})[""]
            self.static_bytes = {name: held[name] for name in ("gradients", "optimizer")}
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return norm.item()

    @property
    def lr(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "static_bytes": self.static_bytes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.static_bytes = state["static_bytes"]


def checkpoint_activations(model: PreTrainedModel) -> None:
    # renamed within transformers 5; the old name warns where the new one exists
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


class Run:
    """The run of one stage, as a context manager: numbering, phases, logging, checkpoints, final save.

    learners: role -> learner; the first one's model is the stage's product and is saved at the top of output_dir, the
        others in a folder named by their role.
    frozen: role -> model that is only read; counted in the memory figures.
    states: name -> another object with state_dict/load_state_dict that a checkpoint must carry.
    evaluator: called with the product before the first step and after the last, and every config.eval_steps steps.
    show: metrics shown in the progress bar.
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
        evaluator: Callable[[PreTrainedModel], Any] | None = None,
        show: tuple[str, ...] = (),
    ) -> None:
        self.evaluator, self.last_evaluation = evaluator, None
        self.config, self.description, self.total_steps, self.show = config, description, total_steps, show
        self.learners, self.tokenizer = learners, tokenizer
        self.frozen = {role: model for role, model in (frozen or {}).items() if model is not None}
        product, *others = learners
        self.models = {"": learners[product].model, **{role: learners[role].model for role in others}}
        self.meter = Meter(self.models[""].device)
        self.states = {**learners, **(states or {}), "meter": self.meter}
        self.described = describe(config)  # now, so that nothing in it can fail when there is a model to lose
        self.first_step, self.train_seconds, self._facts = 1, 0.0, {}

    def __enter__(self) -> "Run":
        mine = checkpoint.MODEL_FILES | self.models.keys()
        if clash := sorted(checkpoint.foreign(self.config.output_dir) & mine):
            found = f"{', '.join(clash)} in {self.config.output_dir}"
            raise ValueError(f"output_dir: expected no model that another program wrote, found {found}")
        resumed = resume_directory(self.config)
        if resumed is not None:
            state = checkpoint.load_state(resumed)
            for name, part in self.states.items():
                part.load_state_dict(state[name])
            self.first_step, self.train_seconds = state["step"] + 1, state["train_seconds"]
            self._facts = state["facts"]
        else:
            self._make_room()
        self.logger = MetricsLogger(
            self.config.output_dir,
            self.total_steps,
            description=self.description,
            tensorboard=self.config.tensorboard,
            resume_step=self.first_step - 1,
            show=self.show,
        )
        self.logger.__enter__()
        if self.config.resume and resumed is None:
            self.logger.say(f"{self.description}: no checkpoint to resume in {self.config.output_dir}, starts anew")
        return self

    def _make_room(self) -> None:
        """Clear what a finished run left, so that nothing of it passes for this one's; refuse an unfinished run's."""
        finished = Path(self.config.output_dir) / "run.json"
        left = checkpoint.latest(self.config.output_dir)
        if left is not None and not finished.exists():
            raise ValueError(
                f"output_dir: expected no unfinished run, found {left}; continue it with resume or name another one"
            )
        checkpoint.clear(self.config.output_dir)
        finished.unlink(missing_ok=True)

    def __exit__(self, *exc: Any) -> None:
        self.logger.__exit__(*exc)

    def steps(self) -> Iterator[int]:
        """Step numbers from 1 (or after the checkpoint), the global generators seeded anew for each."""
        if self.evaluator and self.first_step == 1:
            self.logger.log(0, {**self._evaluate(), "time/total": 0.0})
            checkpoint.write_json(Path(self.config.output_dir) / "samples_before.json", self.last_evaluation.samples)
            self.meter.step(counted=False)
        for step in range(self.first_step, self.total_steps + 1):
            seed_everything(self.config.seed, step)
            yield step

    def end_step(self, step: int, metrics: dict[str, float]) -> None:
        """Evaluate where it is due, log the step with its times and peaks, write a checkpoint where one is due."""
        last = step == self.total_steps
        if self.evaluator and (last or step % (self.config.eval_steps or self.total_steps) == 0):
            metrics = {**metrics, **self._evaluate()}
        measured = self.meter.step()
        self.train_seconds += measured["time/step"] - measured.get("time/evaluation", 0.0)
        self.logger.log(step, {**metrics, **measured, "time/total": self.train_seconds})
        if self.config.save_steps and step % self.config.save_steps == 0 and not last:
            self.save_state(step)
            checkpoint.prune(self.config.output_dir, keep=1)

    def save_state(self, step: int) -> None:
        """Write the checkpoint from which the run goes on after `step`."""
        state = {name: part.state_dict() for name, part in self.states.items()}
        state |= {"step": step, "train_seconds": self.train_seconds, "facts": self._facts}
        files = {_RUN_CONFIG: self.described}
        checkpoint.save(
            self._state_at(step), models=self.models, tokenizer=self.tokenizer, state=state, extra_files=files
        )

    def _state_at(self, step: int) -> Path:
        return Path(self.config.output_dir) / f"checkpoint-{step}"

    def _evaluate(self) -> dict[str, float]:
        with self.meter.phase("evaluation"):
            self.last_evaluation = self.evaluator(self.models[""])
        return self.last_evaluation.metrics

    def note(self, **facts: Any) -> None:
        """Facts for run.json: data counts, truncations, evaluation results. Says so where rows lost tokens."""
        self._facts |= facts
        for name, count in facts.items():
            kind = name.removeprefix("truncated_")
            if kind != name and count:
                cut = f"{count} of {self._facts[kind]} {kind}"
                self.logger.say(f"{self.description}: {cut} are too long and were truncated")

    def finish(self) -> None:
        """Write the trained models, run.json (config, versions, time, memory) and the evaluation's samples."""
        summary = {
            "stage": self.description,
            "config": self.described,
            "steps": self.total_steps,
            "train_seconds": self.train_seconds,
            "phases": self.meter.summary(),
            "static_bytes": self._static_bytes(),
            "parameters": {
                role: sum(p.numel() for p in learner.model.parameters()) for role, learner in self.learners.items()
            },
            "trained_parameters": {
                role: sum(p.numel() for p in learner.parameters) for role, learner in self.learners.items()
            },
            **self._facts,
            "environment": environment(self.meter.device),
        }
        files = {"run.json": summary}
        if self.last_evaluation is not None:
            summary["evaluation"] = self.last_evaluation.metrics
            files["samples.json"] = self.last_evaluation.samples
        checkpoint.save(self.config.output_dir, models=self.models, tokenizer=self.tokenizer, extra_files=files)
        checkpoint.delete(self._state_at(self.total_steps))  # the final model is past it

    def _static_bytes(self) -> dict[str, dict[str, int]]:
        """Weights counted over all roles at once, so that what they share belongs to the first of them."""
        held = static_bytes({**{role: learner.model for role, learner in self.learners.items()}, **self.frozen})
        return {
            role: {**parts, **(self.learners[role].static_bytes if role in self.learners else {})}
            for role, parts in held.items()
        }


def load_policy_and_reference(
    config: OnlineConfig | OfflineConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The trained policy on `device`, and the frozen model its KL is taken to, which is still to be placed there.

    With LoRA the reference is another model object on the policy's weights, unless it names a model of another base:
    without the adapter, or with a frozen one where it is an adapter itself.
    """
    lora, reference = adapters.lora_of(config), config.reference or config.model
    policy = load_policy(resume_directory(config) or config.model, lora=lora).to(device)
    on_policy = lora is not None and adapters.stands_on(policy, adapters.base_path(reference))
    return policy, load_policy(reference, trainable=False, shared=policy if on_policy else None)


def resume_directory(config: StageConfig) -> Path | None:
    """The checkpoint this run continues from, or None; stages load their trained models from it.

    Raises ValueError where another config wrote it. More steps (offline: epochs) than it had are no other config where
    the learning rate is constant: otherwise its decay would have been another one from the start.
    """
    found = checkpoint.latest(config.output_dir) if config.resume else None
    if found is None:
        return None
    if not (found / _RUN_CONFIG).is_file():
        raise ValueError(f"resume: expected a checkpoint with its {_RUN_CONFIG}, found none in {found}")
    length = "steps" if isinstance(config, OnlineConfig) else "epochs"
    now = describe(config)
    for name, then in json.loads((found / _RUN_CONFIG).read_text()).items():
        longer = name == length and config.lr_schedule == "constant" and now[name] > then
        if name not in _MAY_CHANGE and now.get(name) != then and not longer:
            raise ValueError(f"{name}: expected {then!r} as in the run to resume, {found}, got {now.get(name)!r}")
    return found


def seed_everything(seed: int, step: int) -> int:
    """Seed the global generators from (seed, step), so that a resumed run draws what an uninterrupted one would."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "big") >> 1
    random.seed(mixed)
    numpy.random.seed(mixed % 2**32)
    # torch.manual_seed would note down the stack for every kind of device that is not in use, at every step.
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(mixed)
    return mixed


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures of a run depend on."""
    return {
        "rlhf_fast": rlhf_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def micro_batches(rows: int, size: int | None) -> list[slice]:
    size = size or rows
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over rows; the error of a single row is 0."""
    n = values.numel()
    return values.mean().item(), (values.std().item() / math.sqrt(n) if n > 1 else 0.0)


def offline_batches(rows: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The row indices of every step of `epochs` shuffled passes; each pass drops the rows that fill no batch."""
    if rows < batch_size:
        raise ValueError(f"batch_size: expected at most the number of rows, {rows}, got {batch_size}")
    return [batch for epoch in range(epochs) for batch in epoch_batches(rows, batch_size, seed, epoch)]
