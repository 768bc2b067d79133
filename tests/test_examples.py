"""The examples: their configs are valid, and their scripts make the rows they say."""

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from rlhf_fast.config import InitConfig, PipelineConfig
from rlhf_fast.config.arguments import parse
from rlhf_fast.data.encoding import load_rows
from rlhf_fast.report.pipeline import make_plan

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["imdb", "hh_rlhf"])
def test_configs_are_valid(name):
    config = parse(PipelineConfig, ["--config", str(EXAMPLES / name / "pipeline.yaml")], "rlhf-fast pipeline")
    assert list(make_plan(config))[-3:] == ["ppo", "remax", "dpo"]
    init = parse(InitConfig, ["--config", str(EXAMPLES / name / "init.yaml")], "rlhf-fast init")
    assert init.output_dir == config.model
    assert (EXAMPLES / name / init.model_config).is_file()


def test_the_notebook_is_kept_with_the_outputs_of_a_run():
    text = (EXAMPLES / "losses.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", output["output_type"]) for output in outputs} == {"stdout", "display_data"}
    assert sum("assert" in "".join(cell["source"]) for cell in cells) >= len(cells) - 2  # but imports and a picture
    assert len(text) < 100_000


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Runs an example's prepare.py on rows; returns the folder it wrote."""

    def run(name, rows, *flags):
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl.gz").unlink(missing_ok=True)
            write(tmp_path / f"{split}.jsonl.gz", rows[split])
        monkeypatch.syspath_prepend(EXAMPLES / name)
        module = load(EXAMPLES / name / "prepare.py")
        monkeypatch.setattr(module, "OUT", tmp_path / "data")
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path), *flags])
        module.main()
        return tmp_path / "data"

    return run


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def reviews(n, seed):
    rng = random.Random(seed)
    words = {1: ["great", "superb", "loved"], 0: ["awful", "dull", "hated"]}
    sentence = "The {} was {} and the rest of it {} as well."
    return [
        {"text": "\n".join(sentence.format(noun, *rng.sample(words[label], 2)) for noun in nouns), "label": label}
        for label in (0, 1)
        for nouns in [rng.choices(["plot", "cast", "end"], k=5) for _ in range(n)]
    ]


def test_imdb(prepare, monkeypatch, capsys):
    rows = {"train": reviews(40, 0), "test": reviews(20, 1)}
    out = prepare("imdb", rows, "--words", "24", "--excerpts", "2", "--prompts", "7")
    texts = [" ".join(row["text"].split()) for row in rows["train"]]
    sft = load_rows(out / "sft.jsonl.gz", "sft")
    assert len(sft) == 2 * len(texts)  # two excerpts of two sentences each, the fifth sentence is left
    for row in sft:
        excerpt = row["prompt"] + row["completion"]
        assert 2 <= len(row["prompt"].split()) <= 8
        assert len(excerpt.split()) == 24
        assert excerpt.endswith(".")
        assert any(excerpt in text for text in texts)
    assert [row["prompt"] for row in sft] == [row["prompt"] for row in load_rows(out / "prompts.jsonl.gz", "prompt")]
    assert load_rows(out / "prompts_test.jsonl.gz", "prompt") == load_rows(out / "sft_test.jsonl.gz", "sft")[:7]
    assert "accuracy on 40 held-out reviews 1.000" in capsys.readouterr().out

    monkeypatch.setenv("RLHF_FAST_IMDB_CLASSIFIER", str(out / "classifier.pt"))
    positive = load(EXAMPLES / "imdb" / "reward.py").positive
    good, bad = positive(["The plot", "The plot"], [" was great.", " was awful."])
    assert bad < 0.2 < 0.8 < good
    assert positive(["The plot"], [" was great. The plot was great."]) == pytest.approx([good], abs=0.02)


def test_imdb_without_classifier(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_FAST_IMDB_CLASSIFIER", str(tmp_path / "none.pt"))
    with pytest.raises(
        ValueError, match="^RLHF_FAST_IMDB_CLASSIFIER: no classifier at .*none.pt; prepare.py writes one"
    ):
        load(EXAMPLES / "imdb" / "reward.py").positive(["a"], ["b"])


def test_imdb_rejects_other_rows(prepare):
    with pytest.raises(ValueError, match=r"train.jsonl.gz, line 1: expected text \(a string\) and label \(0 or 1\)"):
        prepare("imdb", {"train": [{"text": "a", "label": "pos"}], "test": []})


def test_hh_rlhf(prepare):
    train = [
        {"prompt": f"\n\nHuman: {n}?\n\nAssistant:", "chosen": "yes", "rejected": "no", "subset": "x"} for n in range(5)
    ]
    long = {**train[0], "rejected": "no " * 8}
    out = prepare("hh_rlhf", {"train": [long, *train], "test": train[:3]}, "--max-words", "4", "--prompts", "1")
    first = {"prompt": "\n\nHuman: 0?\n\nAssistant:", "chosen": " yes", "rejected": " no"}
    pairs = load_rows(out / "pairs.jsonl.gz", "preference")
    assert pairs[0] == first  # and not the one with an answer of eight words
    assert [len(rows) for rows in (pairs, load_rows(out / "pairs_test.jsonl.gz", "preference"))] == [5, 3]
    sft = load_rows(out / "sft.jsonl.gz", "sft")
    assert len(sft) == 5
    assert sft[0] == {"prompt": first["prompt"], "completion": " yes"}
    assert load_rows(out / "prompts_test.jsonl.gz", "prompt") == [sft[0]]
