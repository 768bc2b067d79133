"""Tokenizers and models made from nothing."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.config import InitConfig
from rlhf_fast.stages.init import init, init_model, train_bpe

TEXTS = ["the cat sat on the mat . the cat sat .", "a hat , a mat , a cat !", "Das Österreichische Käuzchen"] * 20
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BPE = train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    BPE.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@settings(deadline=None, max_examples=300)
@given(text=st.text())
def test_any_text_round_trips(reloaded, text):
    ids = BPE(text)["input_ids"]
    assert BPE.decode(ids) == text
    assert reloaded(text)["input_ids"] == ids
    assert reloaded.decode(ids) == text


def test_special_tokens_come_first():
    assert (BPE.pad_token_id, BPE.eos_token_id, BPE.bos_token_id) == (0, 1, None)
    assert len(BPE) == 300
    assert BPE("")["input_ids"] == []
    assert BPE("<eos>")["input_ids"] == [1]
    assert len(BPE("the cat")["input_ids"]) < len("the cat")  # merges were learnt
    full = train_bpe(
        TEXTS, 300, pad_token=None, bos_token="<bos>", extra_special_tokens=["<|user|>"], chat_template="x"
    )
    assert (full.eos_token_id, full.bos_token_id, full.convert_tokens_to_ids("<|user|>")) == (0, 1, 2)
    assert full.pad_token is None
    assert full.chat_template == "x"
    assert full("")["input_ids"] == [1]  # puts BOS in front by itself
    assert full("a<|user|>", add_special_tokens=False)["input_ids"][-1] == 2
    assert full.decode(full("a cat ." * 3)["input_ids"], skip_special_tokens=True) == "a cat ." * 3


def test_training_is_deterministic():
    assert train_bpe(TEXTS, 300).get_vocab() == BPE.get_vocab()


def test_vocabulary_must_hold_the_bytes():
    assert len(train_bpe(TEXTS, 258)) == 258
    with pytest.raises(ValueError, match="^vocab_size: expected at least 258 .*, got 257"):
        train_bpe(TEXTS, 257)


def test_init_model_takes_ids_from_the_tokenizer(tmp_path):
    model = init_model(LLAMA, BPE, tmp_path / "model", seed=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.vocab_size == 300
    assert (loaded.config.pad_token_id, loaded.config.eos_token_id, loaded.config.bos_token_id) == (0, 1, None)
    assert loaded.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == BPE.get_vocab()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_weights_follow_the_seed_and_leave_the_global_generator_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (init_model(LLAMA, BPE, tmp_path / "model", seed) for seed in (3, 3, 4))
    assert torch.rand(1) == expected
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_no_pad_token_falls_back_to_eos(tmp_path):
    tokenizer = train_bpe(TEXTS, 300, pad_token=None)
    assert init_model(LLAMA, tokenizer, tmp_path / "model", seed=0).config.pad_token_id == 0 == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"hidden_size": 16}, "^model_config: expected an object with model_type"),
        (["llama"], "^model_config: expected an object with model_type"),
        ({**LLAMA, "hiden_size": 16, "layers": 2}, "^model_config: llama has no hiden_size, layers"),
        ({"model_type": "lama"}, "lama"),
    ],
)
def test_wrong_model_config(tmp_path, config, error):
    with pytest.raises(ValueError, match=error):
        init_model(config, BPE, tmp_path / "model", seed=0)
    assert not (tmp_path / "model").exists()


def init_config(tmp_path, rows, **changes):
    (tmp_path / "model.json").write_text(json.dumps(LLAMA))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_config": str(tmp_path / "model.json"),
        "data": [str(tmp_path / "rows.jsonl")],
        "text_columns": ["prompt", "completion"],
        "output_dir": str(tmp_path / "out"),
        "vocab_size": 262,
    }
    return InitConfig(**{**values, **changes})


def test_init_from_files(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "zzzz"}], "completion": "zzzz"},
        {"prompt": "yyyy", "completion": "yyyy"},
    ]
    init(init_config(tmp_path, rows))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [len(tokenizer(text)["input_ids"]) for text in ("zzzz", "yyyy")] == [1, 1]
    init(init_config(tmp_path, rows, max_rows=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [len(tokenizer(text)["input_ids"]) for text in ("zzzz", "yyyy")] == [1, 4]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(tokenizer) == 260


def test_init_errors(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}]
    with pytest.raises(
        ValueError, match="rows.jsonl, line 2: completion: expected a string or a list of messages, got"
    ):
        init(init_config(tmp_path, rows))
    with pytest.raises(
        ValueError, match="rows.jsonl, line 1: text: expected a string or a list of messages, got nothing"
    ):
        init(init_config(tmp_path, rows, text_columns=["text"]))
    with pytest.raises(ValueError, match=r"^text_columns: expected at least one, got \[\]"):
        init_config(tmp_path, rows, text_columns=[])
    with pytest.raises(ValueError, match="^max_rows: expected an integer >= 1, got 0"):
        init_config(tmp_path, rows, max_rows=0)
    config = init_config(tmp_path, rows[:1])
    (tmp_path / "model.json").write_text("{model_type: llama}")
    with pytest.raises(ValueError, match="^model_config: .*model.json is not JSON: "):
        init(config)
    assert not (tmp_path / "out").exists()
