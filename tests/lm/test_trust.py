"""Code beside a model's weights runs where the config trusts it, and nothing asks whether it may."""

import builtins
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from rlhf_fast import cli
from rlhf_fast.config import RewardConfig, SFTConfig
from rlhf_fast.lm.eight_bits import import_bitsandbytes
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusted, trusting
from rlhf_fast.methods import METHODS, STAGES, load
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.stages import reward, sft
from tests.support.stages import distance, numbers, stage_config, weights

MODEL = """
import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open(os.environ["RAN"], "a").write("x")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """A file that is there once the code has run. A question at the terminal fails the test."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked at the terminal"))
    return tmp_path / "ran"


def copied(model: str, target: Path, file: str, **keys) -> str:
    """The model with code of its own, which a JSON file names."""
    shutil.copytree(model, target)
    (target / "modeling_own.py").write_text(MODEL)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return str(target)


AUTO = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own(tiny_model, tmp_path) -> str:
    """The tiny Llama under a name of its own."""
    return copied(tiny_model, tmp_path / "own", "config.json", model_type="own", auto_map=AUTO)


def test_code_does_not_run_unasked(own, tiny_model, ran, tmp_path):
    """The message names the option."""
    expected = (
        r"^\w+: expected a family of transformers .*, got own at .*own, whose code .*; --trust-remote-code runs it$"
    )
    for read in (load_policy, load_scorer, load_tokenizer):
        with pytest.raises(ValueError, match=expected):
            read(own)
    tokenizer = {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}
    other = copied(
        tiny_model, tmp_path / "t", "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer
    )
    with pytest.raises(ValueError, match="^model: expected a tokenizer of .*; --trust-remote-code runs it$"):
        load_tokenizer(other)
    assert not ran.exists()
    with trusting(True):
        assert type(load_tokenizer(other)).__name__ == "OwnTokenizer"
    assert ran.exists() and not trusted()


def test_known_families_need_no_trust(tiny_model, ran, tmp_path):
    """Their own classes are taken, whatever code stands beside them."""
    model = copied(tiny_model, tmp_path / "known", "config.json", auto_map=AUTO)
    (Path(model) / "custom_generate").mkdir()
    (Path(model) / "custom_generate" / "generate.py").write_text(MODEL)
    assert type(load_policy(model)).__module__.startswith("transformers.") and not ran.exists()


def test_trusted_code_trains_and_is_saved(own, tiny_model, files, ran, tmp_path):
    """The same weights under the same equations give the same numbers; what is saved brings its code along."""
    config = stage_config(SFTConfig, files, own, tmp_path / "a", trust_remote_code=True)
    sft.train(config)
    sft.train(dataclasses.replace(config, model=tiny_model, output_dir=str(tmp_path / "b"), trust_remote_code=False))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM" and (tmp_path / "a" / "modeling_own.py").is_file()
    with pytest.raises(ValueError, match="--trust-remote-code runs it"):
        load_policy(tmp_path / "a")
    for name in ("a", "b"):
        torch.manual_seed(0)  # for the new head
        scorer = stage_config(RewardConfig, files, str(tmp_path / name), tmp_path / f"r{name}", normalize_samples=0)
        reward.train(dataclasses.replace(scorer, trust_remote_code=name == "a"))
    assert distance(weights(tmp_path / "ra"), weights(tmp_path / "rb")) == 0
    with trusting(True):
        load_scorer(tmp_path / "ra", head=None)


def test_every_command_that_loads_a_model_has_the_option():
    configs = [load(row.config) for row in (STAGES | METHODS).values()] + [PlanConfig]
    configs += [load(cli.COMMANDS[name].config) for name in ("pairs", "data", "pipeline", "compare")]
    for config in configs:
        (field,) = [field for field in dataclasses.fields(config) if field.name == "trust_remote_code"]
        assert field.default is False


def test_bitsandbytes_is_imported_without_the_hub(tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bitsandbytes", "kernels")]:
        monkeypatch.delitem(sys.modules, name)
    ops = tmp_path / "bitsandbytes" / "backends" / "cpu" / "ops.py"
    ops.parent.mkdir(parents=True)
    ops.write_text(
        "import logging\ntry:\n    import kernels\n    found = kernels.get_kernel()\n"
        "except Exception:\n    logging.getLogger(__name__).warning('no kernel')\n    found = None\n"
    )
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("from bitsandbytes.backends.cpu import ops\n")
    (tmp_path / "kernels.py").write_text("def get_kernel():\n    return 'from the hub'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_bitsandbytes()
    found = sys.modules["bitsandbytes.backends.cpu.ops"].found  # pyright: ignore[reportAttributeAccessIssue]
    assert found is None and not caplog.records and "kernels" not in sys.modules
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        del sys.modules[name]
