"""The configs of the commands around the training stages: init, pairs, pipeline and demo."""

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from rlhf_fast.config.fields import (
    arg,
    check,
    check_fields,
    check_reward_weights,
    check_row_options,
    random_seed,
    required,
    temperature,
)
from rlhf_fast.config.sampling import SamplerOptions, check_sampler
from rlhf_fast.config.stages import (
    CHAT_TEMPLATE_HELP,
    CHAT_TEMPLATE_KWARGS_HELP,
    COLUMNS_HELP,
    REWARD_TIMEOUT_HELP,
    TRUST_REMOTE_CODE_HELP,
    Dtype,
)
from rlhf_fast.methods import METHODS, STAGES, section

__all__ = [
    "CardConfig",
    "DataConfig",
    "DemoConfig",
    "InitConfig",
    "PairsConfig",
    "PipelineConfig",
    "ReportConfig",
    "WatchConfig",
]

PAIRS = "pairs"  # it reads rows as a training stage does
Class = TypeVar("Class", bound=type)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """A tokenizer trained on text columns and a model with random weights, as one checkpoint directory."""

    model_config: str = required("JSON file with a transformers model config; needs model_type.")
    data: list[str] = required("Files or folders of rows to train BPE on.")
    text_columns: list[str] = required("Columns of text, or of messages, to train it on.")
    output_dir: str = required("Checkpoint directory to write.")
    vocab_size: int = arg(4096, "Tokens, the special ones included.")
    seed: int = random_seed("Seed of the weights.")
    max_rows: int | None = arg(None, "Use only the first so many rows of each file.", at_least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("data", "text_columns"):
            check(self, name, bool, "at least one")


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SamplerOptions):
    """Preference pairs: two samples of a model per prompt, labelled by Bradley-Terry on a reward."""

    model: str = required("Checkpoint directory or hub name to sample from.")
    prompts: str = required("Rows with a prompt column.")
    columns: dict[str, str] = arg({}, COLUMNS_HELP)
    chat_template: str | None = arg(None, CHAT_TEMPLATE_HELP)
    chat_template_kwargs: dict[str, Any] = arg({}, CHAT_TEMPLATE_KWARGS_HELP)
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    reward: str | list[str] = required(
        "Reward-model directory, or a function `package.module:name` or `file.py:name`; repeated: their sum."
    )
    reward_weights: list[float] | None = arg(None, "Weight of each of several rewards; default: 1 for each.")
    reward_timeout: float | None = arg(None, REWARD_TIMEOUT_HELP, above=0)
    output: str = required("JSONL file (.jsonl or .jsonl.gz) to write: prompt, chosen, rejected.")
    scale: float = arg(1.0, "P(a preferred) = sigmoid(scale * (reward(a) - reward(b))).", at_least=0)
    eval_output: str | None = arg(None, "Second file, for the pairs of the last eval_rows prompts.")
    eval_rows: int = arg(0, "Prompts whose pairs are held out into eval_output.", at_least=0)
    max_rows: int | None = arg(None, "Use only the first so many prompts.", at_least=1)
    batch_size: int = arg(64, "Prompts sampled at once.", at_least=1)
    max_prompt_length: int = arg(256, "Longest prompt in tokens; longer ones lose their left end.", at_least=1)
    max_response_length: int = arg(64, "Longest completion in tokens.", at_least=1)
    temperature: float = temperature("Sampling temperature.")
    dtype: Dtype = arg("fp32", "Weights and passes of the model and of reward models.")
    seed: int = random_seed("Seed of sampling and labelling.")

    def __post_init__(self) -> None:
        check_fields(self)
        check_row_options(self)
        check_reward_weights(self)
        check_sampler(self)
        for name in ("output", "eval_output"):
            check(self, name, lambda v: str(v).endswith((".jsonl", ".jsonl.gz")), "a .jsonl or .jsonl.gz file")
        if bool(self.eval_rows) != bool(self.eval_output):
            raise ValueError(f"eval_rows: expected both it and eval_output, or neither, got {self.eval_rows}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows as a training stage sees them: ids, text, trained tokens, what is cut, what is odd."""

    data: str = required("Rows to look at: a file, a folder or glob of shards, or hub:NAME:SPLIT.")
    model: str = required("Checkpoint directory or hub name, whose tokenizer and chat template read the rows.")
    stage: str = arg("sft", "Stage that would read them: sft, reward, dpo, kto, ppo, ..., or pairs.")
    columns: dict[str, str] = arg({}, COLUMNS_HELP)
    chat_template: str | None = arg(None, CHAT_TEMPLATE_HELP)
    chat_template_kwargs: dict[str, Any] = arg({}, CHAT_TEMPLATE_KWARGS_HELP)
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    max_length: int | None = arg(None, "Longest prompt + completion in tokens; default: the stage's own.", at_least=2)
    max_prompt_length: int | None = arg(None, "Longest prompt in tokens; default: the stage's own.", at_least=1)
    rows: int = arg(3, "Rows to show, from the first on.", at_least=0)
    row: list[int] = arg([], "Numbers of rows to show whole in place of the first rows; lines count from 1.")
    html: str | None = arg(None, "File for a page of these rows, whole, that needs nothing else.")

    def __post_init__(self) -> None:
        check_fields(self)
        check_row_options(self)
        check(self, "stage", lambda v: v in (*STAGES, PAIRS), f"one of {', '.join((*STAGES, PAIRS))}")


def _with_a_section_per_method(cls: Class) -> Class:
    """Adds a field for every row of the table of methods, after the fields that the class declares."""
    for command, method in METHODS.items():
        cls.__annotations__[section(command)] = dict[str, Any]
        setattr(cls, section(command), arg({}, f"Keys of {method.config.partition(':')[2]}."))
    return cls


@dataclass(frozen=True, kw_only=True)
@_with_a_section_per_method
class PipelineConfig:
    """SFT -> reward model -> every named method from the same start on the same prompts, then a report.

    The sections hold the stages' own keys; `model`, `output_dir`, `reward` and `seed` are filled in where left out.
    """

    model: str = required("Checkpoint directory or hub name that SFT starts from; with `sft: null` the methods' start.")
    output_dir: str = required("Each stage writes to a folder of its own in here; report.html ties them together.")
    methods: list[str] = arg(["ppo", "remax", "reinforce", "rloo", "dpo"], "Methods to run after the reward model.")
    seed: int = random_seed("Seed of every stage that does not set its own.")
    title: str = arg("RLHF pipeline", "Title of the report.")
    resume: bool = arg(False, "Skip stages that finished; continue the one that was cut off.")
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    common: dict[str, Any] = arg({}, "Keys for every method that has them; a method's own section wins.")
    sft: dict[str, Any] | None = arg({}, "Keys of SFTConfig; null in the YAML file: no SFT.")
    pairs: dict[str, Any] = arg(
        {}, "Keys of PairsConfig; where given, its pairs feed the reward model and the offline methods."
    )
    reward: dict[str, Any] | None = arg(
        {}, "Keys of RewardConfig; null in the YAML file: no reward model, the methods name a reward."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # an empty section in a YAML file is null
            usual = field.default_factory
            if getattr(self, field.name) is None and field.name not in ("sft", "reward") and usual is not MISSING:
                object.__setattr__(self, field.name, usual())
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole pipeline on a small world the project makes itself: no download, minutes on a laptop CPU."""

    output_dir: str = arg("demo_out", "Where models, metrics and report.html go.")
    seed: int = random_seed("Seed of data, models and sampling; same seed, same bits.")
    quick: bool = arg(False, "A tenth of the steps: shows that everything runs, proves nothing.")
    resume: bool = arg(False, "Skip what an earlier, interrupted demo in output_dir finished.")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """An HTML report of any runs: curves, held-out figures, time, memory, and the settings in which they differ."""

    dirs: list[str] = required("Output directories of runs, or folders of them, such as a pipeline's.")
    output: str = arg("report.html", "HTML file to write; the numbers go into the .json beside it.")
    title: str | None = arg(None, "Title of the report; default: the stages and directories.")

    def __post_init__(self) -> None:
        check_fields(self)
        check(self, "dirs", bool, "at least one")
        check(self, "output", lambda path: path.endswith(".html"), "a path that ends in .html")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """The curves of a run in the terminal, drawn anew while the run writes."""

    dir: str = required("Output directory of the run, or a folder of runs; the run that wrote last is shown.")
    every: float = arg(2.0, "Seconds between two looks.", above=0)
    once: bool = arg(False, "Print the curves as they are now, and stop.")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """A model card, README.md with metadata of the Hugging Face hub, from what a finished run left."""

    dir: str = required("Output directory of the run; README.md and figures/ go there.")
    repo: str | None = arg(None, "Name that the model will have on the hub, for the lines that load it.")
    title: str | None = arg(None, "Title; default: the base model and the method.")
    base_model: str | None = arg(None, "Hub name of the base model; default: `model` of the run, if it is one.")
    license: str | None = arg(None, "Licence by the hub's identifier; default: that of the base model's own card.")
    datasets: list[str] = arg([], "Hub names of the data sets.")
    data_license: str | None = arg(None, "Licence of the data.")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("repo", "base_model"):
            check(
                self, name, lambda value: value.count("/") == 1 and not value.startswith("/"), "a name such as org/name"
            )
