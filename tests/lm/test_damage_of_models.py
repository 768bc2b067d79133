"""A damaged file of a model is named, whatever transformers says of it."""

import shutil
from pathlib import Path

import pytest

from rlhf_fast.lm import manifest
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.saving import save_model
from rlhf_fast.lm.tokenizers import load_tokenizer

JSON = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "list": lambda content: b"[]",
    "zeros": lambda content: bytes(len(content)),
    "bytes": lambda content: b"\xff\xfe" * 50,
}


def load(path: Path) -> None:
    load_tokenizer(path)
    load_policy(path)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*JSON, "model.safetensors"])
def test_the_file_is_named(name, damage, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / manifest.NAME).unlink(missing_ok=True)  # a model that nobody has taken the checksums of
    path = tmp_path / "m" / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=f"^{path}: expected .*(JSON|safetensors)") as raised:
        load(tmp_path / "m")
    assert len(str(raised.value)) < len(str(path)) + 300 and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_the_file_of_an_adapter_is_named(name, tiny_model, tmp_path):
    save_model(load_policy(tiny_model, lora=LoRA(2, 16.0, 0)), tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-9])
    for read in (load_policy, load_scorer):
        with pytest.raises(ValueError, match=f"^{path}: expected .*, but the file is damaged"):
            read(tmp_path / "a")


def test_errors_of_whole_files_stay(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="^reward: expected a reward model or an adapter with one"):
        load_scorer(tiny_model, head=None)


def test_files_that_are_added_later_are_not_the_models(tiny_model, tmp_path):
    """Such as a study's judgements of a policy, which must not make another model of it."""
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / manifest.NAME).unlink(missing_ok=True)
    manifest.write(tmp_path / "m", manifest.of_files(tmp_path / "m"))
    before = [file.name for file in manifest.model_files(tmp_path / "m")]
    (tmp_path / "m" / "judged-eval-1.json").write_text("{}")
    assert (
        [file.name for file in manifest.model_files(tmp_path / "m")] == before == sorted([*JSON, "model.safetensors"])
    )
