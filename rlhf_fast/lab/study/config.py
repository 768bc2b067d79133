"""The configs of the studies; as in `rlhf_fast.config`, only values and checks of them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from rlhf_fast.config.fields import arg, check, check_fields


@dataclass(frozen=True, kw_only=True)
class ExactStudyConfig:
    """Every method on a language model whose completions can all be enumerated, against the exact frontier."""

    out: str = arg("study_exact", "Directory for exact.json and exact.png.")
    seeds: int = arg(8, "Seeds of preferences, reward models and rollouts; all share one world.", at_least=2)
    world_seed: int = arg(0, "Seed of the reference policy and the true reward.")
    vocab_size: int = arg(8, "Tokens in the vocabulary.", at_least=2)
    length: int = arg(4, "Tokens in a completion.", at_least=1)
    pairs: int = arg(
        2048, "Preference pairs, sampled from the reference, labelled by Bradley-Terry on the true reward.", at_least=10
    )
    steps: int = arg(300, "Optimizer steps of offline methods, rollouts of online ones.", at_least=1)
    eval_every: int = arg(5, "Steps between two points of a run.", at_least=1)
    batch_size: int = arg(64, "Pairs per step, or completions per rollout.")
    learning_rate: float = arg(0.03, "Learning rate of Adam, the same for every method.", above=0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (least := field.metadata.get("at_least")) is not None:
                check(self, field.name, lambda v, least=least: v >= least, f"at least {least}")
        check_fields(self)
        if self.batch_size < 4 or self.batch_size % 4:
            raise ValueError(f"batch_size: expected a multiple of 4 (RLOO's groups), got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class TrainedStudyConfig:
    """What the studies of trained language models share: where they start, and how many seeds stand behind them."""

    out: str = arg("study_out", "Directory for models, JSON and plots; studies that share it share trained models.")
    pipeline: str | None = arg(
        None, "YAML of `rlhf-fast pipeline` whose models, data and rewards are studied; default: the embedded world."
    )
    seeds: int = arg(3, "Seeds; each has an SFT model, pairs, a reward model and rollouts of its own.")
    workers: int = arg(2, "Runs at a time, each in a process of its own.", at_least=1)
    quick: bool = arg(False, "Embedded world: a tenth of the steps; shows that everything runs, proves nothing.")

    def __post_init__(self) -> None:
        check_fields(self)
        check(self, "seeds", lambda v: v >= 2, "an integer >= 2, for a standard error")


@dataclass(frozen=True, kw_only=True)
class MethodsStudyConfig(TrainedStudyConfig):
    """A study that sets methods side by side."""

    methods: list[str] = arg([], "Only these, as the tables name them; default: all.")


@dataclass(frozen=True, kw_only=True)
class FrontierConfig(MethodsStudyConfig):
    """True reward against KL to the SFT model: every method at several strengths, points over training, envelopes."""

    strengths: Literal["all", "main"] = arg(
        "all", "Every strength of a method, or its main strength only; evaluations over training span a frontier too."
    )
    kl_to: float = arg(8.0, "Envelopes are compared from KL 0 to this, in nats per completion.", above=0)


@dataclass(frozen=True, kw_only=True)
class WinRateConfig(MethodsStudyConfig):
    """Every method against every other one, prompt by prompt, judged by the true reward."""


@dataclass(frozen=True, kw_only=True)
class ConvergenceConfig(MethodsStudyConfig):
    """Win rate against the held-out rows' own completions over training."""


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig(MethodsStudyConfig):
    """Win rate against the held-out rows' own completions over the sampling temperature."""

    temperatures: list[float] = arg([0.0, 0.25, 0.5, 0.75, 1.0], "Sampling temperatures; 0 is greedy.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            "temperatures",
            lambda v: v and all(t >= 0 for t in v) and len(set(v)) == len(v),
            "distinct numbers >= 0",
        )


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(MethodsStudyConfig):
    """The trained policies on prompts of another domain than the domain of their training."""

    shift_data: str | None = arg(
        None, "Rows with prompt and completion of the other domain; the embedded world has one of its own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.shift_data is None) != (self.pipeline is None):
            raise ValueError(f"shift_data: expected it with pipeline, and only then, got {self.shift_data!r}")


@dataclass(frozen=True, kw_only=True)
class VarianceStudyConfig(TrainedStudyConfig):
    """Gradient norm and variance of REINFORCE, ReMax, RLOO and a learned value over training; the two-armed bandit."""

    policies: int = arg(
        8, "Policies measured along the ReMax run, the SFT model first and the trained one last.", at_least=2
    )
    batches: int = arg(8, "Gradients of each estimator on each policy, whose variance is taken.", at_least=2)
