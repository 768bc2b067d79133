"""Bounds stand beside their fields: what they refuse, what `--help` shows, and that subclasses keep them."""

import dataclasses
from dataclasses import dataclass
from typing import get_args

import pytest

from rlhf_fast import cli
from rlhf_fast.config import DPOConfig, PairsConfig, PPOConfig, RewardConfig, RLOOConfig, SFTConfig, StageConfig
from rlhf_fast.config.arguments import make_parser
from rlhf_fast.config.fields import arg, check_fields, random_seed
from rlhf_fast.config.online import RemaxVariant
from rlhf_fast.config.stages import DPOLossType
from rlhf_fast.methods import load
from rlhf_fast.ops.pair_options import LOSS_TYPES
from rlhf_fast.ops.returns import REMAX_VARIANTS

CONFIGS = {name: load(command.config) for name, command in cli.COMMANDS.items()}
STAGE = {"model": "m", "output_dir": "o", "train_data": "t.jsonl"}
ONLINE = {**STAGE, "reward": "f.py:score"}


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """Every kind of bound."""

    rows: int = arg(1, "Rows.", at_least=1)
    few: int = arg(1, "A few.", at_least=1, at_most=3)
    rate: float = arg(1.0, "Rate.", above=0)
    share: float = arg(1.0, "Share.", above=0, at_most=1)
    flip: float = arg(0.0, "Flip.", at_least=0, below=0.5)
    limit: float | None = arg(None, "Limit.", below=10)
    seed: int = random_seed("Seed.")
    names: list[str] = arg(["a"], "Names.")

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", 0, "rows: expected an integer >= 1, got 0"),
        ("few", 4, "few: expected an integer from 1 to 3, got 4"),
        ("rate", 0, "rate: expected a number > 0, got 0"),
        ("rate", float("nan"), "rate: expected a number > 0, got nan"),
        ("share", 0.0, r"share: expected a number in \(0, 1\], got 0.0"),
        ("share", 1.5, r"share: expected a number in \(0, 1\], got 1.5"),
        ("flip", 0.5, r"flip: expected a number in \[0, 0.5\), got 0.5"),
        ("limit", 10.0, "limit: expected a number < 10, got 10.0"),
        ("seed", 2**63, r"seed: expected an integer from 0 to 2\^63 - 1, got 9223372036854775808"),
    ],
)
def test_what_bounds_refuse(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Bounded(**{name: value})


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (RLOOConfig, "missing_eos_penalty", float("nan"), "expected a number, got nan"),
        (RLOOConfig, "max_logprob_drift", float("nan"), "expected a number >= 0, got nan"),
        (RLOOConfig, "max_logprob_drift", -0.1, "expected a number >= 0, got -0.1"),
        (RewardConfig, "normalize_samples", -3, "expected an integer >= 0, got -3"),
    ],
)
def test_what_configs_refuse(config, name, value, message):
    given = ONLINE | {"steps": 1} if config is RLOOConfig else STAGE
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        config(**given, **{name: value})


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (SFTConfig, "learning_rate", float("inf"), "expected a finite number, got inf"),
        (SFTConfig, "weight_decay", 10**400, "expected a finite number, got more"),
        (DPOConfig, "beta", float("inf"), "expected a finite number, got inf"),
        (RLOOConfig, "missing_eos_penalty", float("-inf"), "expected a finite number, got -inf"),
        (RLOOConfig, "temperature", float("inf"), r"expected a number in \[1e-30, 1e\+30\], got inf"),
        (RLOOConfig, "temperature", 1e-45, r"expected a number in \[1e-30, 1e\+30\], got 1e-45"),
        (PPOConfig, "clip", 1.0, r"expected a number in \(0, 1\), got 1.0"),
        (PPOConfig, "clip", 5, r"expected a number in \(0, 1\), got 5"),
    ],
)
def test_what_no_run_can_use(config, name, value, message):
    given = ONLINE | {"steps": 1} if config in (RLOOConfig, PPOConfig) else STAGE
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        config(**given, **{name: value})


def test_infinity_where_it_means_never():
    config = PPOConfig(**ONLINE, steps=1, value_clip=float("inf"), max_logprob_drift=float("inf"))
    assert config.value_clip == config.max_logprob_drift == float("inf")


def test_what_bounds_allow():
    given = {"rows": 1, "few": 3, "rate": 1e-9, "share": 1, "flip": 0.499, "limit": None, "seed": 2**63 - 1}
    assert dataclasses.asdict(Bounded(**given)) == given | {"names": ["a"]}
    Bounded().names.append("b")
    assert Bounded().names == ["a"]  # two configs share no list


def test_help_shows_bounds(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = make_parser(Bounded, "bounded").format_help()
    shown = ["Rows. >= 1 [1]", "A few. from 1 to 3 [1]", "Rate. > 0 [1.0]", "Share. in (0, 1] [1.0]"]
    shown += ["Flip. in [0, 0.5) [0.0]", "Limit. < 10\n", "Seed. from 0 to 2^63 - 1 [0]", "Names. [a]"]
    assert [line for line in shown if line not in text] == []


@pytest.mark.parametrize(
    ("cls", "given", "wrong", "message"),
    [
        (SFTConfig, STAGE, {"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        (SFTConfig, STAGE, {"max_length": 0}, "max_length: expected an integer >= 1, got 0"),
        (SFTConfig, STAGE, {"weight_decay": -0.1}, "weight_decay: expected a number >= 0, got -0.1"),
        (SFTConfig, STAGE, {"micro_batch_size": 3}, "micro_batch_size: expected a divisor of batch_size=16, got 3"),
        (RewardConfig, STAGE, {"center_coef": -1.0}, "center_coef: expected a number >= 0, got -1.0"),
        (DPOConfig, STAGE, {"beta": 0.0}, "beta: expected a number > 0, got 0.0"),
        (PPOConfig, ONLINE, {"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        (PPOConfig, ONLINE, {"gamma": 1.1}, r"gamma: expected a number in \[0, 1\], got 1.1"),
        (PPOConfig, ONLINE, {"minibatches": 5}, "minibatches: expected a divisor of batch_size=32, got 5"),
        (PPOConfig, ONLINE, {"kl_target": 0.0}, "kl_target: expected a number > 0, got 0.0"),
    ],
)
def test_stages_refuse_what_they_refused(cls, given, wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        cls(**given | wrong)


def test_minibatches_count_where_each_weight_is_stepped_in_backward():
    options = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    assert PPOConfig(**ONLINE, **options, minibatches=2, micro_batch_size=16).rows_per_step == 16
    with pytest.raises(ValueError, match="one micro-batch per step with optimizer_in_backward, 16 or more rows, got 8"):
        PPOConfig(**ONLINE, **options, minibatches=2, micro_batch_size=8)
    with pytest.raises(ValueError, match="one micro-batch per step with optimizer_in_backward, 16 or more rows, got 8"):
        SFTConfig(**STAGE, **options, micro_batch_size=8)


def bounds(field: dataclasses.Field) -> dict:
    return {name: bound for name, bound in field.metadata.items() if name != "help"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_subclass_keeps_bounds_and_hides_no_default(name):
    cls = CONFIGS[name]
    for field in dataclasses.fields(cls):
        for base in filter(dataclasses.is_dataclass, cls.__mro__[1:]):
            for theirs in dataclasses.fields(base):
                assert theirs.name != field.name or bounds(theirs) == bounds(field), field.name
        if field.default is not dataclasses.MISSING:  # what the class next in line says, as everywhere in Python
            assert field.default is getattr(cls, field.name), field.name


def test_every_number_of_a_stage_is_bounded_or_free_by_choice():
    free = {"group_size", "missing_eos_penalty", "label_smoothing"}
    stages = [cls for cls in CONFIGS.values() if issubclass(cls, StageConfig)]
    numbers = {
        field.name
        for cls in [*stages, PairsConfig]
        for field in dataclasses.fields(cls)
        if field.type in (int, float, int | None, float | None) and not bounds(field)
    }
    assert numbers == free


def test_choices_are_those_of_the_operations():
    assert get_args(DPOLossType) == LOSS_TYPES
    assert get_args(RemaxVariant) == REMAX_VARIANTS
