"""An option is an index for a kernel: Python's names, C++'s enums and Triton's constants have one order."""

import re
from pathlib import Path

import pytest

from rlhf_fast.kernels import dpo_loss, gae, maths, ppo_loss
from rlhf_fast.ops.kl import ESTIMATORS
from rlhf_fast.ops.pair_options import PAIR_TERMS
from rlhf_fast.ops.policy_options import OBJECTIVES, REDUCTIONS
from rlhf_fast.ops.returns import REMAX_VARIANTS

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def enum(header: str, name: str) -> tuple[str, ...]:
    """The enum's names as Python has them: kTokenMean is token_mean."""
    text = re.sub(r"//.*", "", (CSRC / header).read_text())
    names = re.search(rf"enum {name} {{(.*?)}};", text, re.DOTALL)[1].split(",")
    assert not any("=" in x for x in names), "each value is the name's place"
    return tuple(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", x.strip().removeprefix("k")).lower() for x in names)


@pytest.mark.parametrize(
    "options, header, name, kernel",
    [
        (ESTIMATORS, "math.h", "Estimator", maths),
        (REDUCTIONS, "math.h", "Reduction", ppo_loss),
        (OBJECTIVES, "math.h", "Objective", ppo_loss),
        (PAIR_TERMS, "pair_terms.h", "DPOType", dpo_loss),
        (REMAX_VARIANTS, "returns.h", "RemaxVariant", gae),
    ],
)
def test_one_order(options, header, name, kernel):
    assert enum(header, name) == options
    assert [getattr(kernel, option.upper()).value for option in options] == list(range(len(options)))
