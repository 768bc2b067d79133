"""The reference's log-probs in a file: the next run reads them, and a file of anything else is noticed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from rlhf_fast.config import DPOConfig, KTOConfig
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages import dpo, kto, offline
from tests.support.stages import distance, interrupted, numbers, stage_config, weights

STAGES = {"dpo": (dpo, DPOConfig), "kto": (kto, KTOConfig)}


@pytest.fixture
def passes_of(monkeypatch):
    """Counts the rows that a reference reads."""
    counted = []
    for module in (dpo, kto):
        plain = module.summed_logprobs

        def count(objectives, parts, bf16, plain=plain):
            found = plain(objectives, parts, bf16)
            if not objectives.model.training:
                counted.append(sum(map(len, found)))
            return found

        monkeypatch.setattr(module, "summed_logprobs", count)
    return counted


@pytest.mark.parametrize("name", STAGES)
def test_the_next_run_reads_them(name, files, tiny_model, tmp_path, passes_of, capsys):
    module, cls = STAGES[name]
    file = tmp_path / "refs" / "reference.safetensors"
    plain = stage_config(cls, files, tiny_model, tmp_path / "plain", save_steps=2)
    module.train(plain)
    once = len(passes_of)
    assert once == {"dpo": 1, "kto": 2}[name]
    config = dataclasses.replace(plain, reference_logprobs=str(file), output_dir=str(tmp_path / "first"))
    module.train(config)
    assert len(passes_of) == 2 * once and file.is_file() and list(file.parent.iterdir()) == [file]
    before = file.read_bytes()
    module.train(dataclasses.replace(config, output_dir=str(tmp_path / "second"), seed=1))
    module.train(dataclasses.replace(config, output_dir=str(tmp_path / "third"), micro_batch_size=4))
    assert len(passes_of) == 2 * once and file.read_bytes() == before
    assert "reference log-probs of 96 rows are read from" in capsys.readouterr().err.replace("192", "96")
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "first")) == 0
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "first")
    cut = interrupted(tmp_path / "first", tmp_path / "cut")
    module.train(dataclasses.replace(config, output_dir=str(cut), resume=True))
    assert distance(weights(tmp_path / "plain"), weights(cut)) == 0 and len(passes_of) == 2 * once


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("another reference", {}),
        ("other rows", {"max_length": 20}),
        ("another precision", {"dtype": "bf16"}),
        ("another precision", {"bf16": True, "frozen_dtype": "fp32"}),
    ],
)
def test_a_file_of_something_else_is_written_anew(what, options, files, tiny_model, tmp_path, capsys):
    file = tmp_path / "reference.safetensors"
    config = stage_config(DPOConfig, files, tiny_model, tmp_path / "a", reference_logprobs=str(file))
    dpo.train(config)
    first = load_file(file)
    if not options:
        model = load_policy(tiny_model)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3
        model.save_pretrained(tmp_path / "other")
        load_tokenizer(tiny_model).save_pretrained(tmp_path / "other")
        options = {"reference": str(tmp_path / "other")}
    dpo.train(dataclasses.replace(config, output_dir=str(tmp_path / "b"), **options))
    assert f"reference_logprobs: {file} is of {what}, and is written anew" in capsys.readouterr().err
    dpo.train(dataclasses.replace(config, output_dir=str(tmp_path / "c"), reference_logprobs=None, **options))
    assert distance(weights(tmp_path / "b"), weights(tmp_path / "c")) == 0
    assert (load_file(file)["chosen"] - first["chosen"]).abs().max() > 0


def test_a_damaged_file_is_written_anew(files, tiny_model, tmp_path, capsys):
    file = tmp_path / "reference.safetensors"
    config = stage_config(DPOConfig, files, tiny_model, tmp_path / "a", reference_logprobs=str(file))
    dpo.train(config)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    dpo.train(dataclasses.replace(config, output_dir=str(tmp_path / "b")))
    assert f"reference_logprobs: {file} is damaged, and is written anew" in capsys.readouterr().err
    mended, first = load_file(file), load(whole)
    assert mended.keys() == first.keys() and all(torch.equal(mended[name], first[name]) for name in first)
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0


def test_other_files_are_refused_and_kept(files, tiny_model, tmp_path):
    model = Path(tiny_model) / "model.safetensors"
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for path, found in (
        (model, "a safetensors file of pt"),
        (tmp_path / "plain.safetensors", "a safetensors file of another kind"),
        (tmp_path / "text", "no safetensors file"),
        (tmp_path, "a directory"),
    ):
        before = path.read_bytes() if path.is_file() else None
        config = stage_config(DPOConfig, files, tiny_model, tmp_path / "out", reference_logprobs=str(path))
        with pytest.raises(ValueError, match=rf"reference_logprobs: expected a file that .* got {found}"):
            dpo.train(config)
        assert before is None or path.read_bytes() == before


def test_a_pass_that_breaks_off_leaves_no_file(files, tiny_model, tmp_path, monkeypatch):
    file = tmp_path / "reference.safetensors"
    monkeypatch.setattr(offline.Objectives, "logprobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dpo.train(stage_config(DPOConfig, files, tiny_model, tmp_path / "out", reference_logprobs=str(file)))
    assert not file.exists()
