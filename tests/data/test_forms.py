"""Rows of other data sets become rows of ours: exact rows, and what is refused."""

import json

import pytest

from rlhf_fast.data import encoding as data
from rlhf_fast.data.rows import load_rows, load_unpaired


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


USER, ASSISTANT = turn("user", "hi"), turn("assistant", "yo")


def load(row, kind, **options):
    (loaded,) = load_rows([row], kind, **options)
    return loaded


def refused(row, kind, tmp_path, **options):
    """The error's text behind file and line."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError) as raised:
        load_rows(path, kind, **options)
    start = f"{path}, line 2: "
    assert str(raised.value).startswith(start)
    return str(raised.value).removeprefix(start)


# ------------------------------------------------------------------------------------------------ names


def test_columns_are_renamed(tmp_path):
    names = {"prompt": "question", "completion": "answer"}
    row = {"question": "a", "answer": "b", "source": "x"}
    assert load(row, "sft", columns=names) == {"prompt": "a", "completion": "b", "source": "x"}
    assert load(row, "prompt", columns={"prompt": "question"}) == {"prompt": "a", "answer": "b", "source": "x"}
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert load({"prompt": "a", "completion": "b"}, "sft", columns=swapped) == {"prompt": "b", "completion": "a"}
    error = "columns: expected text, got a row with question, answer, source"
    assert refused(row, "sft", tmp_path, columns={**names, "prompt": "text"}) == error
    assert refused(row, "prompt", tmp_path, columns={"prompt": "question", "gold": "text"}) == error


def test_one_mapping_serves_pairs_and_prompts():
    names = {"prompt": "question", "chosen": "good", "rejected": "bad", "margin": "gap"}
    pair = load({"question": "a", "good": "b", "bad": "c"}, "preference", columns=names)
    assert pair == {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert load({"question": "a"}, "prompt", columns=names) == {"prompt": "a"}
    two = load_unpaired([{"question": "a", "good": "b", "bad": "c"}], names)
    assert [(row["completion"], row["label"]) for row in two] == [("b", True), ("c", False)]


# ------------------------------------------------------------------------------------------------ messages


def test_content_in_parts():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image": None}]
    assert load({"messages": [turn("user", parts), ASSISTANT]}, "sft") == {"messages": [USER, ASSISTANT]}
    row = {"prompt": [turn("user", parts)], "chosen": [turn("assistant", parts)], "rejected": "no"}
    assert load(row, "preference") == {"prompt": [USER], "chosen": [turn("assistant", "hi")], "rejected": "no"}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (turn("user", [{"type": "image"}]), "messages[1]: content[0]: expected a part of type text, got 'image'"),
        (turn("user", ["a"]), "messages[1]: content[0]: expected a part of type text, got 'str'"),
        (turn("user", [{"type": "text"}]), "messages[1]: content[0]: text: expected a string, got nothing"),
        (turn("assistant", None), "messages[1]: content: expected a string, got nothing"),
        (turn("assistant", None, tool_calls=[]), "messages[1]: content: expected a string, got nothing"),
        (turn("assistant", "a", weight=0.5), "messages[1]: weight: expected 0 or 1, got 0.5"),
        ({"from": "robot", "value": "a"}, "messages[1]: from: expected one of system, human, user, gpt, assistant, "),
        ({"from": "gpt", "value": None}, "messages[1]: content: expected a string, got nothing"),
    ],
)
def test_messages_that_cannot_be_read(message, error, tmp_path):
    assert refused({"messages": [USER, message]}, "sft", tmp_path).startswith(error)


def test_tool_calls_need_no_content():
    calls = turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    messages = [USER, calls, turn("tool", "x"), ASSISTANT]
    assert load({"messages": messages}, "sft") == {"messages": messages}
    nulls = [turn("user", "hi", tool_calls=None, name=None), ASSISTANT]  # as a table writes them
    assert load({"messages": nulls}, "sft") == {"messages": [USER, ASSISTANT]}


def test_weights_that_leave_nothing_to_train_on(tmp_path):
    context = turn("assistant", "a", weight=0)
    assert refused({"messages": [USER, context]}, "sft", tmp_path) == "messages: no assistant turn to train on"
    assert (
        load({"messages": [context, USER, ASSISTANT]}, "sft")["messages"][0] == context
    )  # begins with no trained turn
    error = "completion: weight: expected 1 in an answer, which is trained on as a whole, got 0"
    assert refused({"prompt": [USER], "completion": [context]}, "sft", tmp_path) == error


def test_tools_and_options_of_the_template(tmp_path):
    tools, options = [{"type": "function", "function": {"name": "f"}}], {"thinking": False}
    row = {"prompt": [USER], "tools": json.dumps(tools), "chat_template_kwargs": json.dumps(options)}
    assert load(row, "prompt") == {"prompt": [USER], "tools": tools, "chat_template_kwargs": options}
    text = {"prompt": "a", "tools": "a hammer"}  # no conversation, so the column is the reward function's
    assert load(text, "prompt") == text
    assert refused({**row, "tools": "f"}, "prompt", tmp_path) == "tools: expected a list of objects, got str"
    assert refused({**row, "tools": ["f"]}, "prompt", tmp_path) == "tools: expected a list of objects, got list"
    error = "chat_template_kwargs: expected an object with named options, got list"
    assert refused({**row, "chat_template_kwargs": []}, "prompt", tmp_path) == error


# ------------------------------------------------------------------------------------------------ other forms


def test_sharegpt():
    said = [("system", "short"), ("human", "hi"), ("gpt", "yo"), ("observation", "x"), ("gpt", "ok")]
    conversations = [{"from": role, "value": text} for role, text in said]
    messages = [turn(r, t) for r, t in zip(("system", "user", "assistant", "tool", "assistant"), "?????", strict=True)]
    messages = [{**m, "content": text} for m, (_, text) in zip(messages, said, strict=True)]
    assert load({"conversations": conversations, "id": 1}, "sft") == {"id": 1, "messages": messages}
    assert load({"chat": conversations}, "sft", columns={"messages": "chat"}) == {"messages": messages}
    assert load({"conversations": [USER, ASSISTANT]}, "sft") == {"messages": [USER, ASSISTANT]}
    weighted = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo", "weight": 1}]
    assert load({"conversations": weighted}, "sft")["messages"][1] == turn("assistant", "yo", weight=1)
    loaded = load({"conversations": conversations[1:3], "system": "short"}, "sft")
    assert loaded["messages"] == messages[:3]
    asked = {"conversations": conversations[:2]}
    assert load(asked, "prompt") == {"prompt": messages[:2]}
    pair = {**asked, "chosen": {"from": "gpt", "value": "yo"}, "rejected": {"from": "gpt", "value": "no"}}
    prompt, no = messages[:2], [turn("assistant", "no")]
    assert load(pair, "preference") == {"prompt": prompt, "chosen": [ASSISTANT], "rejected": no}


def test_alpaca(tokenizer, tmp_path):
    row = {"instruction": "a", "input": "b", "output": "c"}
    loaded = load(row, "sft")
    assert (loaded["prompt"], loaded["completion"]) == ([turn("user", "a\nb")], "c")
    assert loaded["prompt"].text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\na\n\n### Input:\nb\n\n### Response:"
    )
    short = load({"instruction": "a", "input": "", "output": "c"}, "sft")["prompt"]
    assert short == [turn("user", "a")]
    assert short.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\na\n\n### Response:"
    )
    (text,) = data.encode_prompts([load(row, "prompt")], tokenizer, 99).examples
    assert text.prompt == loaded["prompt"].text  # this tokenizer has no chat template
    pair = load({"instruction": "a", "chosen": "b", "rejected": "c"}, "preference")
    assert pair["prompt"] == [turn("user", "a")]
    assert refused({**row, "history": [["a", "b"]]}, "sft", tmp_path).startswith("history: expected none beside")
    assert refused({**row, "instruction": 3}, "sft", tmp_path) == "instruction: expected a string, got int"
    assert load({**row, "prompt": "x", "completion": "y"}, "sft")["prompt"] == "x"  # our own columns win


HUMAN = "\n\nHuman: hi there\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (f"{HUMAN} It is 4.", f"{HUMAN} It is 5.", HUMAN),
        (f"{HUMAN} yo{HUMAN} a", f"{HUMAN} yo{HUMAN} b", f"{HUMAN} yo{HUMAN}"),
        (f"{HUMAN} yo{HUMAN} a", f"{HUMAN} no", HUMAN),
        ("The film was good.", "The film was great.", "The film was"),
        ("The film was good.", "The film was", "The film was"),
        ("The film was good.", "The film wasn't.", "The film"),
        ("Q: a\nA: b", "Q: a\nA: c", "Q: a\nA:"),
        ("The film was", "The film was", "The film"),
    ],
)
def test_shared_beginning_of_texts(chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    n = len(prompt)
    for a, b in ((chosen, rejected), (rejected, chosen)):
        expected = {"prompt": prompt, "chosen": a[n:], "rejected": b[n:]}
        assert load({"chosen": a, "rejected": b}, "preference") == expected
    good, bad = load_unpaired([row])
    assert (good["prompt"], good["completion"], bad["completion"]) == (prompt, chosen[n:], rejected[n:])


def test_shared_beginning_of_conversations(tmp_path):
    more = [turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")]
    no = turn("assistant", "no")
    row = {"chosen": [USER, ASSISTANT], "rejected": [USER, no]}
    expected = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [no]}
    assert load(row, "preference") == expected
    assert load({**row, "prompt": [USER]}, "preference") == expected
    assert load({**row, "prompt": " hi\n"}, "preference") == expected  # UltraFeedback's form
    assert load({"chosen": [USER, *more], "rejected": [USER, *more[:2], no]}, "preference") == {
        "prompt": [USER, *more[:2]],
        "chosen": more[2:],
        "rejected": [no],
    }
    several = load({"chosen": [USER, *more], "rejected": [USER, no]}, "preference")
    assert several == {"prompt": [USER], "chosen": more, "rejected": [no]}
    assert load({"prompt": [USER], "chosen": more, "rejected": [no]}, "preference") == several
    same = load({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "preference")
    assert same == {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}
    with_parts = [turn("user", [{"type": "text", "text": "hi"}]), ASSISTANT]
    assert load({**row, "chosen": with_parts}, "preference") == expected
    error = "prompt: expected the messages that chosen and rejected begin with, got others"
    assert refused({**row, "prompt": "bye"}, "preference", tmp_path) == error
    assert refused({**row, "prompt": [turn("user", "bye")]}, "preference", tmp_path) == error
    error = "missing prompt, and chosen and rejected do not begin with the same messages"
    assert refused({"chosen": [ASSISTANT], "rejected": [no]}, "preference", tmp_path) == error
    assert refused({**row, "rejected": [turn("user", "x"), no]}, "preference", tmp_path) == error
    error = "missing prompt, and chosen and rejected do not begin alike"
    assert refused({"chosen": "yes", "rejected": "no"}, "preference", tmp_path) == error
    error = "chosen: expected messages up to an assistant turn, got the roles assistant, user"
    assert refused({"prompt": [USER], "chosen": more[:2], "rejected": [no]}, "preference", tmp_path) == error


# ------------------------------------------------------------------------------------------------ half an emoji

HALF = "hi \ud83d"


@pytest.mark.parametrize(
    ("kind", "row", "column"),
    [
        ("sft", {"prompt": HALF, "completion": "a"}, "prompt"),
        ("sft", {"prompt": "a", "completion": HALF}, "completion"),
        ("sft", {"messages": [USER, turn("assistant", HALF)]}, "messages"),
        ("sft", {"messages": [USER, turn("assistant", [{"type": "text", "text": HALF}])]}, "messages"),
        ("sft", {"messages": [USER, ASSISTANT], "tools": [{"name": HALF}]}, "tools"),
        ("preference", {"prompt": "a", "chosen": HALF, "rejected": "b"}, "chosen"),
        ("preference", {"prompt": [USER], "chosen": "a", "rejected": [turn("assistant", HALF)]}, "rejected"),
        ("ranking", {"prompt": "a", "completions": ["a", HALF], "ranks": [0, 1]}, "completions"),
        ("unpaired", {"prompt": "a", "completion": HALF, "label": True}, "completion"),
        ("prompt", {"prompt": "a", "answer": HALF}, "answer"),
        ("prompt", {"prompt": "a", "answer": {HALF: 1}}, "answer"),
    ],
)
def test_half_an_emoji_names_file_and_line(kind, row, column, tmp_path):
    error = "expected Unicode text, got half an emoji (a lone surrogate) at character 4: 'hi \\ud83d'"
    assert refused(row, kind, tmp_path) == f"{column}: {error}"


def test_whole_emojis_and_columns_that_nobody_uses_pass(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00", "completion": "ü", "note": "\\ud83d"}\n')
    assert load_rows(path, "sft") == [{"prompt": "\U0001f600", "completion": "ü", "note": "\ud83d"}]
