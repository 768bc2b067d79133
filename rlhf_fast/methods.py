"""The table of training stages: one row has everything that the package knows about a stage by its name.

The command line, the pipeline, the planner, `compare`, the studies and the plots read this table. A new method needs a
config class in `config/online.py`, `clipped.py` or `stages.py`, a module in `stages/` and a row here; then tests, docs,
changelog.

This module imports nothing of the package, so that every other module may import it. A row therefore names classes and
functions by strings of the form "package.module:name", and `load` imports them when they are used.
"""

from importlib import import_module
from typing import Any, Literal, NamedTuple


class Stage(NamedTuple):
    """A training stage, which is the function `train` of one object of the class `config`.

    The fields from `samples` on describe the stage's passes through its models, for the planner and `compare`.
    """

    title: str  # in tables, plots and reports
    help: str  # in the overview of `rlhf-fast --help`
    config: str
    train: str
    rows: str  # the kind of rows in train_data, one of `data.rows.KINDS`
    roles: tuple[str, ...]  # its models, out of policy, value, reward and reference; the first model is trained
    online: bool = False  # it samples from its policy; an offline stage learns from the rows of train_data alone
    color: str = ""  # of a method in plots
    marker: str = ""  # of a method in plots
    samples: int | Literal["group_size"] = 1  # samples of a prompt in a round; "group_size": the config has the number
    greedy: bool = False  # a greedy completion of each prompt is decoded and scored too, but not trained on
    kl_pass: bool = False  # before an update the policy, without gradients, reads completions of other rows
    minibatches: bool = False  # the stage trains on minibatches of a rollout, which are copies of its rows
    one_piece: bool = False  # prompt and completion go through the model as one sequence, in which some tokens count
    sequences: int = 1  # sequences that a row of a batch makes in a pass; a pair makes two

    def samples_of(self, group_size: int) -> int:
        """Samples per prompt under a config with this `group_size`, which stages without groups ignore."""
        return group_size if self.samples == "group_size" else self.samples

    @property
    def needs_reward(self) -> bool:
        """Whether the stage's config has `reward`: a reward model, or a function in its place."""
        return "reward" in self.roles[1:]


FIRST_STAGES = {
    "sft": Stage(
        title="SFT",
        help="supervised fine-tuning",
        config="config:SFTConfig",
        train="stages.sft:train",
        rows="sft",
        roles=("policy",),
        one_piece=True,
    ),
    "reward": Stage(
        title="Reward model",
        help="reward model from preferences",
        config="config:RewardConfig",
        train="stages.reward:train",
        rows="preference",
        roles=("reward",),
        sequences=2,
    ),
}
"""The stages that make the models that methods start from: command -> row."""

METHODS = {
    "ppo": Stage(
        title="PPO",
        help="PPO with a value model",
        config="config:PPOConfig",
        train="stages.ppo:train",
        rows="prompt",
        roles=("policy", "value", "reward", "reference"),
        online=True,
        color="#0072B2",
        marker="o",
        minibatches=True,
    ),
    "remax": Stage(
        title="ReMax",
        help="REINFORCE with a greedy baseline",
        config="config:ReMaxConfig",
        train="stages.remax:train",
        rows="prompt",
        roles=("policy", "reward", "reference"),
        online=True,
        color="#D55E00",
        marker="s",
        greedy=True,
    ),
    "reinforce": Stage(
        title="REINFORCE",
        help="REINFORCE without a baseline",
        config="config:ReinforceConfig",
        train="stages.reinforce:train",
        rows="prompt",
        roles=("policy", "reward", "reference"),
        online=True,
        color="#CC79A7",
        marker="^",
    ),
    "rloo": Stage(
        title="RLOO",
        help="REINFORCE with a leave-one-out baseline",
        config="config:RLOOConfig",
        train="stages.rloo:train",
        rows="prompt",
        roles=("policy", "reward", "reference"),
        online=True,
        color="#009E73",
        marker="D",
        samples="group_size",
    ),
    "grpo": Stage(
        title="GRPO",
        help="clipped updates on scores whitened within groups",
        config="config:GRPOConfig",
        train="stages.grpo:train",
        rows="prompt",
        roles=("policy", "reward", "reference"),
        online=True,
        color="#882255",
        marker="X",
        samples="group_size",
        minibatches=True,
    ),
    "online-dpo": Stage(
        title="Online DPO",
        help="DPO on pairs that the policy samples and the reward labels",
        config="config:OnlineDPOConfig",
        train="stages.online_dpo:train",
        rows="prompt",
        roles=("policy", "reward", "reference"),
        online=True,
        color="#56B4E9",
        marker="P",
        samples=2,
    ),
    "dpo": Stage(
        title="DPO",
        help="direct preference optimisation",
        config="config:DPOConfig",
        train="stages.dpo:train",
        rows="preference",
        roles=("policy", "reference"),
        color="#E69F00",
        marker="v",
        sequences=2,
    ),
    "kto": Stage(
        title="KTO",
        help="preference optimisation from completions labelled good or bad",
        config="config:KTOConfig",
        train="stages.kto:train",
        rows="unpaired",
        roles=("policy", "reference"),
        color="#999933",
        marker="<",
        kl_pass=True,
    ),
}
"""The methods, which start from an SFT model and are compared with each other: command -> row."""

STAGES = FIRST_STAGES | METHODS


def section(command: str) -> str:
    """The key of a method's section in a pipeline's config: `online-dpo` is a command, `online_dpo` a field."""
    return command.replace("-", "_")


def load(target: str) -> Any:
    """The object that "package.module:name" names within rlhf_fast, such as "stages.ppo:train"."""
    module, name = target.split(":")
    return getattr(import_module(f"rlhf_fast.{module}"), name)
