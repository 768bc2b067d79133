"""A model card says what a run was made with, and the classes of the hub read it; a push sends model and card."""

import dataclasses
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from rlhf_fast.config import CardConfig
from rlhf_fast.report import hub
from rlhf_fast.report.card import run
from rlhf_fast.stages import sft
from tests.support.stages import STAGES, stage_config


@pytest.fixture(scope="module")
def trained(files, tiny_model, tmp_path_factory):
    """The directory of a PPO run with held-out prompts."""
    module, config_class = STAGES["ppo"]
    directory = tmp_path_factory.mktemp("card") / "ppo"
    config = stage_config(config_class, files, tiny_model, directory)
    module.train(dataclasses.replace(config, eval_data=files["prompts"]))
    return directory


def test_a_card_of_a_run(trained, files):
    run(CardConfig(dir=str(trained), repo="me/mine", base_model="org/base", license="mit", datasets=["org/rows"]))
    card = huggingface_hub.ModelCard.load(trained / "README.md")
    data = card.data.to_dict()
    assert data == {
        "base_model": "org/base",
        "datasets": ["org/rows"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "rlhf_fast", "ppo"],
    }
    record = json.loads((trained / "run.json").read_text())
    assert "# base, PPO" in card.text and "[arXiv 1707.06347](https://arxiv.org/abs/1707.06347)" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card.text
    assert f"| learning_rate | {record['config']['learning_rate']} |" in card.text
    assert (
        "| held out | before | after |" in card.text and f"{record['evaluation']['eval/reward']:.3f}"[:4] in card.text
    )
    assert str(trained) not in card.text and files["prompts"] not in card.text  # no path of this machine
    pictures = [line.rpartition("(")[2].rstrip(")") for line in card.text.splitlines() if line.startswith("![")]
    assert pictures and all((trained / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    run(CardConfig(dir=str(trained)))  # again, over a card of ours
    assert "not stated" in (trained / "README.md").read_text()


def test_a_card_of_somebody_else_stays(trained):
    own = (trained / "README.md").read_bytes() if (trained / "README.md").exists() else None
    (trained / "README.md").write_text("# mine\n")
    with pytest.raises(ValueError, match="dir: expected no README.md of somebody else"):
        run(CardConfig(dir=str(trained)))
    assert (trained / "README.md").read_text() == "# mine\n"
    (trained / "README.md").unlink() if own is None else (trained / "README.md").write_bytes(own)


def test_only_a_finished_run_has_a_card(tmp_path):
    with pytest.raises(ValueError, match=r"dir: expected the output directory of a finished run, found no run.json in"):
        run(CardConfig(dir=str(tmp_path)))
    with pytest.raises(ValueError, match="base_model: expected a name such as org/name, got 'base'"):
        CardConfig(dir="d", base_model="base")


class FakeApi:
    """The calls of HfApi that a push makes."""

    calls: list = []
    fault: Exception | None = None

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))

    def upload_folder(self, **options):
        if self.fault:
            raise self.fault
        paths = [str(p.relative_to(options["folder_path"])) for p in options["folder_path"].rglob("*") if p.is_file()]
        kept = list(huggingface_hub.utils.filter_repo_objects(paths, ignore_patterns=options["ignore_patterns"]))
        self.calls.append(("upload", options["repo_id"], sorted(kept)))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", FakeApi)
    return FakeApi


def test_a_stage_pushes_what_a_reader_needs(api, files, tiny_model, tmp_path):
    module, config_class = STAGES["sft"]
    config = stage_config(config_class, files, tiny_model, tmp_path / "run")
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "secret").touch()
    module.train(dataclasses.replace(config, push_to_hub="me/mine", save_steps=1))
    created, uploaded = api.calls
    assert created == ("create", "me/mine", {"exist_ok": True}) and uploaded[:2] == ("upload", "me/mine")
    assert {"README.md", "config.json", "model.safetensors", "run.json", "tokenizer.json"} <= set(uploaded[2])
    wrong = [path for path in uploaded[2] if path.startswith(("checkpoint-", "wandb", "samples", "metrics", "."))]
    assert not wrong


def test_a_push_that_fails_keeps_the_model_and_says_how_to_send_it(api, files, tiny_model, tmp_path, monkeypatch):
    response = SimpleNamespace(headers={}, status_code=507, request=None)
    monkeypatch.setattr(api, "fault", HfHubHTTPError("no room", response=response))
    config = stage_config(STAGES["sft"][1], files, tiny_model, tmp_path / "run")
    with pytest.raises(ValueError, match=r"push_to_hub: .* got no room; the model is in .*run, and `hf upload me/mine"):
        sft.train(dataclasses.replace(config, push_to_hub="me/mine"))
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_hub_that_does_not_know_you_is_found_before_the_run(api, files, tiny_model, tmp_path, monkeypatch):
    def unknown(self):
        raise HfHubHTTPError("401", response=SimpleNamespace(headers={}, status_code=401, request=None))

    config = stage_config(STAGES["sft"][1], files, tiny_model, tmp_path / "run")
    with pytest.raises(ValueError, match="push_to_hub: expected a name such as org/name, got 'a/b/c'"):
        sft.train(dataclasses.replace(config, push_to_hub="a/b/c"))
    monkeypatch.setattr(api, "whoami", unknown)
    with pytest.raises(ValueError, match="push_to_hub: expected a hub that knows you .`hf auth login`., got 401"):
        sft.train(dataclasses.replace(config, push_to_hub="me/mine"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
