"""Rows that cannot be encoded are named by file and line; texts to be scored are encoded as rows are."""

import json

import pytest

from rlhf_fast.data import encoding as data
from rlhf_fast.data.rows import load_rows
from tests.support.text import ASSISTANT, BOS, EOS, USER, A, B, C, D, E, F, sft, word_tokenizer


def test_errors_of_encoding_name_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"

    def encode(encoder, kind, row, *lengths):
        path.write_text("\n\n" + json.dumps(row) + "\n")
        with pytest.raises(ValueError) as raised:
            encoder(load_rows(path, kind), tokenizer, *lengths)
        start = f"{path}, line 3: "
        assert str(raised.value).startswith(start)
        return str(raised.value).removeprefix(start)

    empty = "prompt: has no tokens; the first token of an answer needs one to follow"
    assert encode(data.encode_prompts, "prompt", {"prompt": ""}, 9) == empty
    pair = {"prompt": "", "chosen": "a", "rejected": "b"}
    assert encode(data.encode_preferences, "preference", pair, 9, 9) == empty
    ranking = {"prompt": "", "completions": ["a", "b"], "ranks": [0, 1]}
    assert encode(data.encode_rankings, "ranking", ranking, 9, 9) == empty
    nothing = "has nothing to train on: prompt and completion are empty"
    assert encode(data.encode_sft, "sft", {"prompt": "", "completion": ""}, 9, 9) == nothing
    no_template = "has messages, but the tokenizer has no chat template"
    assert encode(data.encode_prompts, "prompt", {"prompt": [USER]}, 9) == no_template
    assert encode(data.encode_sft, "sft", {"messages": [USER, ASSISTANT]}, 9, 9) == no_template
    greeting = "messages: begins with an assistant turn, which needs one to follow"
    assert encode(data.encode_sft, "sft", {"messages": [ASSISTANT, USER, ASSISTANT]}, 9, 9) == greeting


def test_nothing_to_train_on_is_an_error(tokenizer):
    rows = [{"prompt": "", "completion": "a"}, {"prompt": " ", "completion": ""}]
    with pytest.raises(ValueError, match="^row 2: has nothing to train on"):
        data.encode_sft(rows, tokenizer, 9, 9)
    with_bos = word_tokenizer(eos_token="<eos>", bos_token="<bos>")
    assert sft(with_bos, "", "") == ([BOS, EOS], "-x", 0)


def test_texts_are_encoded_as_in_training():
    words = word_tokenizer(eos_token="<eos>", bos_token="<bos>")
    rows = [
        {"prompt": "a b", "chosen": "c", "rejected": "d e"},
        {"prompt": "<bos> a b c", "chosen": "", "rejected": "f"},
    ]
    pairs = data.encode_preferences(rows, words, 9, 3).examples
    for name in ("chosen", "rejected"):
        prompts, answers = [row["prompt"] for row in rows], [row[name] for row in rows]
        encoded = data.encode_texts(prompts, answers, [True, True], words, 9, 3)
        assert encoded == [(pair.prompt_ids, getattr(pair, f"{name}_ids")) for pair in pairs]
    assert data.encode_texts(["a"], ["b"], [False], words, 9, 9) == [([BOS, A], [B])]
    assert data.encode_texts(["a b c"], ["d e f"], [True], words, 6, 9) == [([BOS, C], [D, E, F, EOS])]


@pytest.mark.parametrize("margin", ["9" * 400, "1e300", "3.5e38", "-1e39"])
def test_margins_that_float32_does_not_hold(margin, tmp_path):
    row = '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": %s}\n'
    (tmp_path / "p.jsonl").write_text(row % "3.4e38" + row % margin)
    expected = "p.jsonl, line 2: margin: expected a number that float32 holds, got "
    with pytest.raises(ValueError, match=expected) as raised:
        load_rows(tmp_path / "p.jsonl", "preference")
    assert len(str(raised.value)) < len(f"{tmp_path}/{expected}") + 81
