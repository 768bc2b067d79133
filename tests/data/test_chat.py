"""What a chat template gets, and which of its tokens are trained on."""

import pytest

from rlhf_fast.data import encoding as data
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.rows import load_rows
from tests.support.text import EOS, A, B, C, D, E, F, word_tokenizer

# f stands for a tool, e for the beginning of an answer, and b for reasoning that is switched off.
TEMPLATE = (
    "{% for t in tools or [] %}f {% endfor %}{% for m in messages %}{{ 'e ' if m.role == 'assistant' }}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %} {{ call.function.name }}{% endfor %}"
    "{{ ' <eos> ' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}e "
    "{% if thinking is defined and not thinking %}b {% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "c"}}]


@pytest.fixture(scope="module")
def tokenizer():
    return with_template(word_tokenizer(eos_token="<eos>"), TEMPLATE)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def sft(row, tokenizer, **options):
    """The ids of a row, and its trained tokens."""
    ((ids, mask),) = data.encode_sft(load_rows([row], "sft"), tokenizer, 99, 99, **options).examples
    return ids, [token for token, trained in zip(ids, mask, strict=True) if trained]


def test_weight_0_is_context(tokenizer):
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    whole = [A, E, B, EOS, C, E, D, EOS]
    assert sft({"messages": messages}, tokenizer) == (whole, [B, EOS, D, EOS])
    assert sft({"messages": [*messages[:3], {**messages[3], "weight": 1}]}, tokenizer)[1] == [B, EOS, D, EOS]
    first = [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    assert sft({"messages": first}, tokenizer) == (whole, [D, EOS])
    last = [*messages[:3], {**messages[3], "weight": 0}]
    assert sft({"messages": last}, tokenizer) == (whole[:4], [B, EOS])  # nothing follows the last trained token


def test_tools_and_their_calls(tokenizer):
    messages = [turn("user", "a"), turn("assistant", None, tool_calls=[{"function": {"name": "c"}}]), turn("tool", "d")]
    messages += [turn("assistant", "b")]
    whole = [A, E, C, EOS, D, E, B, EOS]
    assert sft({"messages": messages}, tokenizer) == (whole, [C, EOS, B, EOS])
    assert sft({"messages": messages, "tools": TOOLS}, tokenizer) == ([F, *whole], [C, EOS, B, EOS])
    assert sft({"messages": messages, "tools": []}, tokenizer)[0] == whole
    pair = {"prompt": messages[:1], "chosen": messages[1:], "rejected": "b", "tools": TOOLS * 2}
    (encoded,) = data.encode_preferences(load_rows([pair], "preference"), tokenizer, 99, 99).examples
    assert encoded == ([F, F, A, E], [C, EOS, D, E, B, EOS], [B, EOS], None)
    (prompt,) = data.encode_prompts(load_rows([{"prompt": messages[:1], "tools": TOOLS}], "prompt"), tokenizer, 9)[0]
    assert (prompt.prompt_ids, prompt.columns) == ([F, A, E], {"tools": TOOLS})


def test_options_of_row_and_run(tokenizer):
    off, on = {"thinking": False}, {"thinking": True}
    for own, given, ids in (
        ({}, None, [A, E]),
        ({}, off, [A, E, B]),
        ({"chat_template_kwargs": off}, None, [A, E, B]),
        ({"chat_template_kwargs": off}, on, [A, E, B]),  # the row's own option wins
        ({"chat_template_kwargs": on}, off, [A, E]),
        ({"chat_template_kwargs": None}, off, [A, E, B]),
    ):
        rows = load_rows([{"prompt": [turn("user", "a")], **own}], "prompt")
        assert data.encode_prompts(rows, tokenizer, 9, given).examples[0].prompt_ids == ids
    with pytest.raises(ValueError, match="^row 1: the tokenizer's chat template refuses the messages: .*tokenize"):
        data.encode_prompts(rows, tokenizer, 9, {"tokenize": False})


def test_templates_from_a_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    for template in (TEMPLATE, file, str(file)):
        tokenizer = with_template(word_tokenizer(eos_token="<eos>"), template)
        assert tokenizer.chat_template == TEMPLATE
        assert sft({"messages": [turn("user", "a"), turn("assistant", "b")]}, tokenizer)[0] == [A, E, B, EOS]
    assert with_template(tokenizer, None).chat_template == TEMPLATE
    with pytest.raises(
        ValueError, match="^chat_template: expected a Jinja file or a template, found no file no.jinja$"
    ):
        with_template(tokenizer, "no.jinja")
    with pytest.raises(ValueError, match="chat_template: expected a Jinja template, got a syntax error in line 2"):
        with_template(tokenizer, "{{ bos_token }}\n{{ x")


def test_alpaca_goes_through_the_template(tokenizer):
    row = {"instruction": "a", "input": "b", "output": "c d"}
    assert sft(row, tokenizer) == ([A, B, E, C, D, EOS], [C, D, EOS])


def test_a_messages_column_beside_a_text_prompt_is_no_conversation(tokenizer):
    with_bos = with_template(word_tokenizer(eos_token="<eos>", bos_token="<bos>"), TEMPLATE)
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "messages": [turn("user", "x")]}
    (pair,) = data.encode_preferences(load_rows([row], "preference"), with_bos, 9, 9).examples
    assert pair.prompt_ids == [2, A]  # BOS, which templates write by themselves
