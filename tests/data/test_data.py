"""Rows and their encoding: exact token ids, masks and error texts."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from rlhf_fast.data import encoding as data
from rlhf_fast.data.rows import load_rows
from rlhf_fast.stages.init import train_bpe
from tests.support.text import ASSISTANT, BOS, EOS, PAD, USER, A, B, C, D, E, F, sft, word_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '<eos>' if m.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def bpe():
    tokens = ["<|user|>", "<|system|>", "<|assistant|>"]
    return train_bpe(["a b c d", "the cat"], 300, extra_special_tokens=tokens, chat_template=CHAT)


SFT_ROWS = [{"prompt": "a b", "completion": "c", "topic": "x"}, {"prompt": "ünï \n", "completion": "", "topic": "y"}]
PREFERENCE_ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}]


# ------------------------------------------------------------------------------------------------ reading


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines + "\n")  # a blank line at the end is no row
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows_directory"])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("sft", SFT_ROWS),
        ("sft", [{"messages": [USER, ASSISTANT]}]),
        ("preference", PREFERENCE_ROWS),
        ("ranking", [{"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 0, 1]}]),
        ("prompt", [{"prompt": [USER], "answer": 42}]),
    ],
)
def test_every_source_gives_the_same_rows(tmp_path, name, kind, rows):
    assert load_rows(write(tmp_path / name, rows), kind) == rows
    assert load_rows(str(tmp_path / name), kind) == load_rows(rows, kind) == rows


def test_dataset_in_memory():
    assert load_rows(datasets.Dataset.from_list(SFT_ROWS), "sft") == SFT_ROWS


def test_absent_margin_in_a_table_is_no_margin(tmp_path, tokenizer):
    rows = [*PREFERENCE_ROWS, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    loaded = load_rows(write(tmp_path / "rows.parquet", rows), "preference")
    assert [example.margin for example in data.encode_preferences(loaded, tokenizer, 8, 8).examples] == [0.5, None]


def message(content="a", role="user"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("kind", "row", "error"),
    [
        ("sft", {"prompt": "a"}, "missing completion; a row of kind sft needs prompt, completion (or messages)"),
        ("sft", {"prompt": None, "completion": None}, "missing prompt, completion; a row of kind sft needs"),
        ("sft", {"prompt": "a", "completion": 3}, "completion: expected a string, got int"),
        ("sft", {"prompt": "a", "completion": [message(role="assistant")]}, "completion: expected a string, got list"),
        ("sft", {"prompt": 3, "completion": "a"}, "prompt: expected a string or a list of messages, got int"),
        ("sft", {"messages": []}, "messages: expected a string or a list of messages, got an empty list"),
        ("sft", {"messages": ["a"]}, "messages[0]: expected an object with role and content, got str"),
        ("sft", {"messages": [message(), {"role": "user"}]}, "messages[1]: content: expected a string, got nothing"),
        ("sft", {"messages": [message(role=1)]}, "messages[0]: role: expected a string, got int"),
        ("sft", {"messages": [message()]}, "messages: no assistant turn to train on"),
        ("sft", ["a"], "expected an object with named columns, got list"),
        (
            "sft",
            {"prompt": [message()], "completion": [message(role="assistant"), message()]},
            "completion: expected one assistant message, got the roles assistant, user",
        ),
        ("prompt", {"text": "a"}, "missing prompt; a row of kind prompt needs prompt"),
        (
            "prompt",
            {"prompt": [message(), message("", role="assistant")]},
            "prompt: ends in an assistant turn without text, in which no completion can go on",
        ),
        ("preference", {"prompt": "a", "chosen": "b"}, "missing rejected; a row of kind preference needs prompt,"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": {}}, "rejected: expected a string, got dict"),
        ("preference", {**PREFERENCE_ROWS[0], "margin": "1"}, "margin: expected a finite number, got '1'"),
        ("preference", {**PREFERENCE_ROWS[0], "margin": True}, "margin: expected a finite number, got True"),
        ("preference", {**PREFERENCE_ROWS[0], "margin": float("nan")}, "margin: expected a finite number, got nan"),
        ("ranking", {"prompt": "a", "completions": ["b", "c"]}, "missing ranks; a row of kind ranking needs prompt,"),
        ("ranking", {"prompt": "a", "completions": "bc", "ranks": [0, 1]}, "completions: expected a list, got str"),
        ("ranking", {"prompt": "a", "completions": ["b", 1], "ranks": [0, 1]}, "completions[1]: expected a string,"),
        ("ranking", {"prompt": "a", "completions": ["b"], "ranks": [0, 1]}, "ranks: 2 ranks for 1 completions"),
        ("ranking", {"prompt": "a", "completions": ["b", "c"], "ranks": [0.0, 1]}, "ranks: expected integers from 0"),
        ("ranking", {"prompt": "a", "completions": ["b", "c"], "ranks": [-1, 0]}, "ranks: expected integers from 0"),
        ("ranking", {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}, "ranks: expected at least two"),
    ],
)
def test_malformed_row_names_file_line_and_column(tmp_path, kind, row, error):
    good = {
        "sft": SFT_ROWS[0],
        "prompt": {"prompt": "a"},
        "preference": PREFERENCE_ROWS[0],
        "ranking": {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]},
    }[kind]
    path = write(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(ValueError) as raised:
        load_rows(path, kind)
    assert str(raised.value).startswith(f"{path}, line 2: {error}")
    with pytest.raises(ValueError) as raised:
        load_rows([good, row], kind)
    assert str(raised.value).startswith(f"row 2: {error}")


def test_malformed_row_in_a_table_is_named_by_row(tmp_path):
    for name in ("rows.parquet", "rows_directory"):
        path = write(tmp_path / name, [*SFT_ROWS, {"prompt": "a", "completion": None, "topic": ""}])
        with pytest.raises(ValueError, match=f"^{path}, row 3: missing completion"):
            load_rows(path, "sft")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("rows.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "{path}, line 3: not JSON in UTF-8: Expecting value"),
        ("rows.jsonl", b'{"prompt": "\xff"}\n', "{path}, line 1: not JSON in UTF-8: 'utf-8' codec can't decode"),
        ("rows.jsonl.gz", b'{"prompt": "a"}\n', "{path}, after line 0: damaged gzip file: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9], "{path}, after line "),
        ("rows.jsonl", b"\n", "{path}: no rows"),
        ("rows.parquet", b"PAR", "{path}: not a Parquet file: "),
        (
            "rows.txt",
            b"a\n",
            "{path}: expected .jsonl, .json, .csv, .tsv (also with .gz), .parquet or a `datasets` dire",
        ),
    ],
)
def test_unreadable_file(tmp_path, name, content, error):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load_rows(path, "prompt")
    assert str(raised.value).startswith(error.format(path=path))


def test_unreadable_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.jsonl: no such file or directory"):
        load_rows(tmp_path / "missing.jsonl", "sft")
    with pytest.raises(ValueError, match=f"^{tmp_path}: not a directory written by `datasets.Dataset.save_to_disk`"):
        load_rows(tmp_path, "sft")
    dataset = datasets.Dataset.from_list(SFT_ROWS)
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits: holds the splits train, test; give the directory of one"):
        load_rows(tmp_path / "splits", "sft")
    assert load_rows(tmp_path / "splits" / "test", "sft") == SFT_ROWS
    with pytest.raises(
        ValueError, match="^kind: expected one of sft, preference, ranking, unpaired, prompt, got 'dpo'"
    ):
        load_rows(SFT_ROWS, "dpo")
    with pytest.raises(ValueError, match="^rows: no rows"):
        load_rows([], "sft")


# ------------------------------------------------------------------------------------------------ encoding


def test_sft_trains_on_completion_and_eos(tokenizer):
    assert sft(tokenizer, "a b", "c d") == ([A, B, C, D, EOS], "--xxx", 0)
    assert sft(tokenizer, "a b", "") == ([A, B, EOS], "--x", 0)
    assert sft(tokenizer, "", "c") == ([C, EOS], "xx", 0)
    assert sft(tokenizer, "a", "c <eos>") == ([A, C, EOS], "-xx", 0)  # not a second EOS


def test_bos_comes_once():
    tokenizer = word_tokenizer(eos_token="<eos>", bos_token="<bos>")
    assert sft(tokenizer, "a b", "c") == ([BOS, A, B, C, EOS], "---xx", 0)
    assert sft(tokenizer, "<bos> a b", "c") == ([BOS, A, B, C, EOS], "---xx", 0)
    assert sft(tokenizer, "", "c") == ([BOS, C, EOS], "-xx", 0)
    assert sft(tokenizer, "a b c d", "e", max_prompt_length=3) == ([BOS, C, D, E, EOS], "---xx", 1)  # and survives cuts
    assert data.encode_prompts([{"prompt": ""}], tokenizer, 4).examples[0].prompt_ids == [BOS]
    without = word_tokenizer(eos_token="<eos>")
    without.bos_token = "<bos>"  # known, but the tokenizer does not put it in front by itself
    assert sft(without, "a", "c") == ([A, C, EOS], "-xx", 0)


@pytest.mark.parametrize(
    ("max_length", "max_prompt_length", "ids", "mask", "truncated"),
    [
        (7, 4, [A, B, C, D, E, F, EOS], "----xxx", 0),
        (7, 3, [B, C, D, E, F, EOS], "---xxx", 1),  # the prompt alone is too long
        (6, 4, [A, B, C, D, E, F], "----xx", 1),  # the row is too long: the completion's end goes, EOS with it
        (6, 3, [B, C, D, E, F, EOS], "---xxx", 1),
        (4, 4, [B, C, D, E], "---x", 1),  # the prompt alone fills the row: a token of the completion stays
        (3, 4, [C, D, E], "--x", 1),
        (2, 4, [D, E], "-x", 1),
    ],
)
def test_truncation(tokenizer, max_length, max_prompt_length, ids, mask, truncated):
    assert sft(tokenizer, "a b c d", "e f", max_length, max_prompt_length) == (ids, mask, truncated)


def test_truncated_counts_rows(tokenizer):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a b", "completion": "b"},
        {"prompt": "a b c", "completion": ""},
    ]
    encoded = data.encode_sft(rows, tokenizer, 99, 1)
    assert encoded.truncated == 2
    assert [example.input_ids for example in encoded.examples] == [[A, B, EOS], [B, B, EOS], [C, EOS]]


def test_lost_prompts_and_lost_ends_are_counted_apart(tokenizer):
    texts = [("a b c", "d"), ("a", "b c d e"), ("a b c", "b c d e"), ("a", "b")]
    encoded = data.encode_sft([{"prompt": p, "completion": c} for p, c in texts], tokenizer, 4, 2)
    assert [example.input_ids for example in encoded.examples] == [
        [B, C, D, EOS],
        [A, B, C, D],
        [B, C, B, C],
        [A, B, EOS],
    ]
    assert (encoded.truncated, encoded.cut_prompts, encoded.cut_answers) == (3, 2, 2)
    prompts = data.encode_prompts([{"prompt": p} for p, _ in texts], tokenizer, 2)
    assert (prompts.truncated, prompts.cut_prompts, prompts.cut_answers) == (2, 2, 0)


def test_lengths_must_leave_room(tokenizer):
    with pytest.raises(ValueError, match="^max_length: expected at least 2, got 1"):
        sft(tokenizer, "a", "b", max_length=1)
    with pytest.raises(ValueError, match="^max_prompt_length: expected at least 1, got 0"):
        sft(tokenizer, "a", "b", max_prompt_length=0)


def test_each_answer_of_a_pair_is_cut_by_itself(tokenizer):
    rows = [
        {"prompt": "a b c", "chosen": "d", "rejected": "e f", "margin": 2},
        {"prompt": "a b c", "chosen": "d e f a b", "rejected": ""},
    ]
    encoded = data.encode_preferences(rows, tokenizer, 5, 3)
    assert encoded.examples == [
        ([A, B, C], [D, EOS], [E, F], 2.0),
        ([A, B, C], [D, E], [EOS], None),
    ]
    assert (encoded.truncated, encoded.cut_prompts, encoded.cut_answers) == (2, 0, 2)
    assert encoded.cuts == [(0, 0, (0, 1)), (1, 0, (4, 0))]


def test_rankings(tokenizer):
    rows = [{"prompt": "a b", "completions": ["c", "d", "e f"], "ranks": [1, 0, 1]}]
    encoded = data.encode_rankings(rows, tokenizer, 5, 2)
    assert encoded == ([([A, B], [[C, EOS], [D, EOS], [E, F, EOS]], [1, 0, 1])], [(0, 0, (0, 0, 0))])


def test_prompts_keep_their_text_and_columns(tokenizer):
    encoded = data.encode_prompts([{"prompt": "a b c", "answer": 42}, {"prompt": "d"}], tokenizer, 2)
    assert encoded.examples == [([B, C], "a b c", {"answer": 42}, None), ([D], "d", {}, None)]
    assert encoded.truncated == 1


def test_prompt_without_tokens_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="^row 2: prompt: has no tokens"):
        data.encode_prompts([{"prompt": "a"}, {"prompt": " "}], tokenizer, 9)
    with pytest.raises(ValueError, match="^row 1: prompt: has no tokens"):
        data.encode_preferences([{"prompt": "", "chosen": "a", "rejected": "b"}], tokenizer, 9, 9)


def test_tokenizer_without_eos_is_an_error():
    with pytest.raises(ValueError, match="^tokenizer: has no EOS token"):
        sft(word_tokenizer(pad_token="<pad>"), "a", "b")


@pytest.mark.parametrize("special", [{"pad_token": "<eos>"}, {}], ids=["pad == eos", "no pad"])
def test_pad_token_changes_nothing(tokenizer, special):
    other = word_tokenizer(eos_token="<eos>", **special)
    assert sft(other, "a b", "c <eos> d") == sft(tokenizer, "a b", "c <eos> d") == ([A, B, C, EOS, D, EOS], "--xxxx", 0)
    assert data.pad_id(other) == EOS
    assert data.pad_id(tokenizer) == PAD
    assert data.pad_id(word_tokenizer()) == 0
    ids, mask = data.pad_right([[A, EOS], [A, EOS, D, EOS]], data.pad_id(other))
    assert ids.tolist() == [[A, EOS, EOS, EOS], [A, EOS, D, EOS]]
    assert mask.sum(1).tolist() == [2, 4]  # EOS that is data counts, EOS that is padding does not


# ------------------------------------------------------------------------------------------------ conversations


def trained_text(tokenizer, example):
    return tokenizer.decode([token for token, trained in zip(*example, strict=True) if trained])


def test_all_assistant_turns_are_trained(bpe):
    turns = [message("be brief", "system"), message("hi"), message("yes sir", "assistant"), message("bye")]
    encoded = data.encode_sft([{"messages": [*turns, message("so long", "assistant")]}], bpe, 500, 500)
    (example,) = encoded.examples
    assert bpe.decode(example.input_ids) == (
        "<|system|>be brief\n<|user|>hi\n<|assistant|>yes sir<eos>\n<|user|>bye\n<|assistant|>so long<eos>"
    )
    assert trained_text(bpe, example) == "yes sir<eos>so long<eos>"  # not the line break behind EOS
    (last_user,) = data.encode_sft([{"messages": turns}], bpe, 500, 500).examples
    assert bpe.decode(last_user.input_ids).endswith("yes sir<eos>")  # nothing follows the last trained token


def test_conversation_and_string_answers_encode_alike(bpe):
    prompt = [message("hi"), message("yes", "assistant"), message("bye")]
    as_text = data.encode_sft([{"prompt": prompt, "completion": "so long"}], bpe, 500, 500)
    as_turn = data.encode_sft([{"prompt": prompt, "completion": [message("so long", "assistant")]}], bpe, 500, 500)
    assert as_text == as_turn
    (example,) = as_text.examples
    assert trained_text(bpe, example) == "so long<eos>"  # the earlier assistant turn is part of the prompt
    row = {"prompt": prompt, "chosen": "so long", "rejected": [message("no", "assistant")]}
    (pair,) = data.encode_preferences([row], bpe, 500, 500).examples
    assert pair.prompt_ids + pair.chosen_ids == example.input_ids
    assert bpe.decode(pair.rejected_ids) == "no<eos>"
    (only_prompt,) = data.encode_prompts([{"prompt": prompt}], bpe, 500).examples
    assert only_prompt.prompt_ids == pair.prompt_ids
    assert only_prompt.prompt == "<|user|>hi\n<|assistant|>yes<eos>\n<|user|>bye\n<|assistant|>"


def test_template_without_eos_gets_one_at_the_end():
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = train_bpe(["a"], 300, chat_template=template)
    (example,) = data.encode_sft(
        [{"messages": [message("hi"), message("yes", "assistant")]}], tokenizer, 99, 99
    ).examples
    assert tokenizer.decode(example.input_ids) == "user: hi\nassistant: yes<eos>"
    assert trained_text(tokenizer, example) == "yes<eos>"


def test_template_that_rewrites_earlier_turns_is_an_error(bpe):
    last_only = "{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}"
    tokenizer = train_bpe(["a"], 300, chat_template=last_only)
    with pytest.raises(ValueError, match="^row 1: the tokenizer's chat template writes the messages before an answer"):
        data.encode_sft([{"messages": [message("hi"), message("yes", "assistant")]}], tokenizer, 99, 99)
    with pytest.raises(ValueError, match="^row 1: the tokenizer's chat template writes the messages before an answer"):
        data.encode_sft([{"prompt": [message("hi")], "completion": "yes"}], tokenizer, 99, 99)


def test_template_errors(tokenizer):
    with pytest.raises(ValueError, match="^row 1: has messages, but the tokenizer has no chat template"):
        data.encode_prompts([{"prompt": [message("a")]}], tokenizer, 9)
    strict = train_bpe(["a"], 300, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="^row 1: .*chat template refuses the messages: roles must alternate"):
        data.encode_prompts([{"prompt": [message("a")]}], strict, 9)


# ------------------------------------------------------------------------------------------------ batching


def test_padding():
    ids, mask = data.pad_left([[5], [6, 7, 8]], 9)
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    ids, mask = data.pad_right([[5], [6, 7, 8]], 9)
    assert ids.tolist() == [[5, 9, 9], [6, 7, 8]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert [part.shape for part in data.pad_left([], 9)] == [(0, 0), (0, 0)]
    assert data.pad_left([[], [5]], 9)[0].tolist() == [[9], [5]]


def test_epoch_batches():
    batches = data.epoch_batches(10, 4, seed=1, epoch=0)
    assert [len(batch) for batch in batches] == [4, 4]
    kept = data.epoch_batches(10, 4, seed=1, epoch=0, drop_last=False)
    assert [len(batch) for batch in kept] == [4, 4, 2]
    assert kept[:2] == batches
    assert sorted(sum(kept, [])) == list(range(10))
    assert batches == data.epoch_batches(10, 4, seed=1, epoch=0)
    assert batches not in (data.epoch_batches(10, 4, seed=1, epoch=1), data.epoch_batches(10, 4, seed=2, epoch=0))
    assert len(data.epoch_batches(8, 4, seed=1, epoch=0)) == 2
    with pytest.raises(ValueError, match="^batch_size: expected between 1 and the 3 rows there are, got 4"):
        data.epoch_batches(3, 4, seed=0, epoch=0)
