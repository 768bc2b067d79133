"""Every decoder class of transformers trains and decodes with the numbers of plain transformers in float64."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_fast.lm.loading import load_policy
from rlhf_fast.rollout.generate import generate
from tests.support import zoo_table, zoo_turns
from tests.support.zoo import VERSION, ZOO, make_config, model_type
from tests.support.zoo_checks import measure, save_member
from tests.support.zoo_refused import AHEAD, REFUSED

MOST = 5e-5  # of every error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "member" in metafunc.fixturenames:
        metafunc.parametrize("member", zoo_turns.members(metafunc.config.getoption("--zoo")))


@pytest.mark.filterwarnings("ignore:rlhf_fast")
def test_numbers_are_those_of_plain_transformers(member, tmp_path):
    errors, *ways = measure(member, tmp_path)
    assert {kind: error for kind, error in errors.items() if not error <= MOST} == {}
    assert {"gradients from hidden states", "gradients from logits", "dpo", "greedy tokens"} <= errors.keys()
    if transformers.__version__ == VERSION:
        assert zoo_table.read()[member] == tuple(ways)  # docs/models.md; `python -m tests.support.zoo_table` writes it


@pytest.mark.parametrize("name", [name for name in REFUSED if model_type(name) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(name, tmp_path):
    (said, settings), kind = REFUSED[name], model_type(name)
    if said == AHEAD:  # only a trial of the model itself finds it out
        save_member(name, tmp_path)
    else:
        config = {"model_type": kind, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]], **settings}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^model: expected .*{said}") as refusal:
        load_policy(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_model_that_looks_ahead_does_not_decode():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("bert that looks ahead")).eval()
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(
        ValueError, match="depend on no later token, got BertLMHeadModel; set is_decoder in its config$"
    ):
        generate(model, ids, ids > 0, max_new_tokens=2, eos_ids=[1], pad_id=0)


def test_every_class_of_transformers_is_in_the_zoo(pytestconfig):
    """A class that a newer transformers brings is an error where the whole zoo is asked for, else a warning."""
    known = {model_type(name) for name in (*ZOO, *REFUSED)}
    new = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - known)
    if new and transformers.__version__ != VERSION and pytestconfig.getoption("--zoo") != "all":
        warnings.warn(f"zoo: transformers {transformers.__version__} has new decoders: {', '.join(new)}", stacklevel=1)
    else:
        assert new == []


def test_every_member_has_its_turn():
    turns = [zoo_turns.members(str(turn)) for turn in range(zoo_turns.TURNS)]
    assert set().union(*turns) == set(zoo_turns.members("all"))
    assert set.intersection(*map(set, turns)) == set(zoo_turns.members("none"))
