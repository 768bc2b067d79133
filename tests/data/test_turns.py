"""One end of a turn, whatever the template: in SFT, pairs, prompts, texts that are scored, and where rollouts stop."""

import pytest

from rlhf_fast.data import encoding as data
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.rows import load_rows
from rlhf_fast.data.turns import end_ids, note_listed_ends, turns_of
from tests.support.templates import FAMILIES, byte_tokenizer, piece_tokenizer
from tests.support.text import word_tokenizer

TOKENIZERS = [(name, kind) for name in FAMILIES for kind in ("bytes", "legacy", "first")]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASK = [turn("user", "Name a colour.")]
BLUE, RED = turn("assistant", "Blue."), turn("assistant", "Red.")


@pytest.fixture(params=TOKENIZERS, ids=" ".join)
def family(request):
    """(the family, a tokenizer of it)"""
    name, kind = request.param
    return FAMILIES[name], byte_tokenizer(name) if kind == "bytes" else piece_tokenizer(name, kind)


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def trained(tokenizer, example):
    return tokenizer.decode([token for token, on in zip(*example, strict=True) if on])


def sft(tokenizer, *messages):
    return data.encode_sft(load_rows([{"messages": list(messages)}], "sft"), tokenizer, 999, 999).examples


def pair(tokenizer, **row):
    row = {"chosen": "Blue.", "rejected": [RED], **row}
    return data.encode_preferences(load_rows([row], "preference"), tokenizer, 999, 999).examples[0]


def test_the_end_is_what_the_template_writes(family):
    truth, tokenizer = family
    turns = turns_of(tokenizer)
    assert (turns.text, turns.end) == (truth.end, tokenizer.convert_tokens_to_ids(truth.end))
    expected = {tokenizer.eos_token_id, turns.end, *tokenizer.convert_tokens_to_ids(list(truth.listed))}
    assert end_ids(tokenizer) == sorted(expected)


def test_every_kind_of_row_has_one_end(family):
    truth, tokenizer = family
    end, whole = turns_of(tokenizer).end, ids_of(tokenizer, [*ASK, BLUE])
    (example,) = sft(tokenizer, *ASK, BLUE)
    length = len(example.input_ids) - 1
    if truth is FAMILIES["plain words"]:  # "assistant: " ends within a token of "assistant: Blue."
        head = ids_of(tokenizer, ASK, add_generation_prompt=True)
        whole = [*head, *example.input_ids[len(head) : -1]]
    assert example.input_ids == [*whole[:length], end]  # of the whole text, as the template writes it
    assert end not in example.input_ids[example.mask.index(True) : length]
    assert whole[length:][:1] in ([end], []) or tokenizer.decode(whole[length:]).isspace()
    assert trained(tokenizer, example).endswith(f"Blue.{' ' * (truth is FAMILIES['llama2'])}{truth.end}")
    both = pair(tokenizer, prompt=ASK)
    assert both.prompt_ids + both.chosen_ids == example.input_ids
    assert both.rejected_ids[-1] == end and both.rejected_ids.count(end) == 1
    as_row = data.encode_sft(load_rows([{"prompt": ASK, "completion": "Blue."}], "sft"), tokenizer, 999, 999).examples
    assert as_row == [example]
    rows = [{"prompt": p, "completion": "Blue.", "label": True} for p in (ASK, [turn("user", "hi")])]
    unpaired = data.encode_unpaired(load_rows(rows, "unpaired"), tokenizer, 999, 999).examples
    assert unpaired[0].prompt_ids + unpaired[0].completion_ids == example.input_ids
    ranking = {"prompt": ASK, "completions": ["Blue.", "Red."], "ranks": [0, 1]}
    (ranked,) = data.encode_rankings(load_rows([ranking], "ranking"), tokenizer, 999, 999).examples
    assert (ranked.prompt_ids, ranked.completion_ids) == (both.prompt_ids, [both.chosen_ids, both.rejected_ids])


def test_prompts_are_those_of_apply_chat_template(family):
    _, tokenizer = family
    (prompt,) = data.encode_prompts(load_rows([{"prompt": ASK}], "prompt"), tokenizer, 999).examples
    assert prompt.prompt_ids == ids_of(tokenizer, ASK, add_generation_prompt=True)
    # a text in the template's form is such a conversation: same BOS, same end
    as_text = pair(tokenizer, prompt=prompt.prompt, rejected="Red.")
    assert as_text.prompt_ids == prompt.prompt_ids
    assert as_text.chosen_ids[-1] == turns_of(tokenizer).end
    ((ids, answer),) = data.encode_texts([prompt.prompt], ["Blue."], [True], tokenizer, 999, 999)
    assert (ids, answer) == (as_text.prompt_ids, as_text.chosen_ids)


def test_plain_text_ends_in_eos(family):
    _, tokenizer = family
    eos = tokenizer.eos_token_id
    plain = pair(tokenizer, prompt="The sky is", chosen=" Blue.", rejected=" Red." + tokenizer.eos_token + "\n")
    assert plain.prompt_ids + plain.chosen_ids == [*tokenizer("The sky is Blue.")["input_ids"], eos]
    assert plain.prompt_ids + plain.rejected_ids == [*tokenizer("The sky is Red.")["input_ids"], eos]  # not a second


def test_cut_off_answers_have_no_end(family):
    _, tokenizer = family
    whole, cut = pair(tokenizer, prompt=ASK), pair(tokenizer, prompt=ASK, chosen_finished=False)
    assert tokenizer.decode(cut.chosen_ids).endswith("Blue.")
    assert whole.chosen_ids[: len(cut.chosen_ids)] == cut.chosen_ids
    assert cut.rejected_ids == whole.rejected_ids
    text = pair(tokenizer, prompt="The sky is", chosen=" Blue.", rejected=" Red.", chosen_finished=False)
    assert text.prompt_ids + text.chosen_ids == tokenizer("The sky is Blue.")["input_ids"]


def test_answers_that_have_begun(family):
    truth, tokenizer = family
    if truth is FAMILIES["r1"]:
        return  # writes no text behind its opening as it stands
    begun = [*ASK, turn("assistant", "Bl")]
    (prompt,) = data.encode_prompts(load_rows([{"prompt": begun}], "prompt"), tokenizer, 999).examples
    assert prompt.prompt_ids == ids_of(tokenizer, begun, continue_final_message=True)
    both = pair(tokenizer, prompt=begun, chosen="ue.", rejected=[turn("assistant", "ack.")])
    assert both.prompt_ids == prompt.prompt_ids
    (example,) = sft(tokenizer, *ASK, BLUE)
    assert tokenizer.decode(both.prompt_ids + both.chosen_ids) == tokenizer.decode(example.input_ids)
    assert both.rejected_ids[-1] == both.chosen_ids[-1] == turns_of(tokenizer).end


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_of_a_conversation_is_trained_once(name):
    """Where a template writes earlier turns otherwise, a row for each turn: the turn as it is when it is the last."""
    tokenizer = byte_tokenizer(name)
    first = turn("assistant", "<think>hm</think>Blue.")
    messages = [*ASK, first, turn("user", "More."), RED]
    examples = sft(tokenizer, *messages)
    assert len(examples) == (2 if name in ("qwen3", "gpt-oss") else 1)
    alone = sft(tokenizer, *messages[:2])
    end = "" if name == "plain words" else FAMILIES[name].end  # which such a template writes nowhere
    parts = trained(tokenizer, alone[0]).removesuffix(FAMILIES[name].end), trained(tokenizer, examples[-1])
    if len(examples) == 2:
        assert examples[0] == alone[0]
        assert ids_of(tokenizer, messages)[: len(examples[1].input_ids)] == examples[1].input_ids
        assert parts[1].endswith("Red." + end) and "Blue." not in parts[1]
    else:
        assert parts[1].startswith(parts[0] + end) and parts[1].endswith(FAMILIES[name].end)
        assert parts[1].count("Red.") == parts[1].count("Blue.") == 1


def test_reasoning_of_the_history_is_dropped_in_pairs_too():
    tokenizer = byte_tokenizer("qwen3")
    history = [*ASK, turn("assistant", "<think>hm</think>Blue."), turn("user", "More.")]
    both = pair(tokenizer, prompt=history, chosen="<think>so</think>Red.")
    assert both.prompt_ids == ids_of(tokenizer, history, add_generation_prompt=True)
    assert "hm" not in tokenizer.decode(both.prompt_ids)
    assert tokenizer.decode(both.chosen_ids) == "<think>\nso\n</think>\n\nRed.<|im_end|>"


def test_turns_that_answer_the_same_question_share_a_row():
    tokenizer = byte_tokenizer("qwen3")
    calls = [*ASK, turn("assistant", "call"), turn("tool", "blue"), BLUE]
    (example,) = sft(tokenizer, *calls)
    assert trained(tokenizer, example) == "<think>\n\n</think>\n\ncall<|im_end|><think>\n\n</think>\n\nBlue.<|im_end|>"
    later = sft(tokenizer, *calls, turn("user", "More."), RED)
    assert [trained(tokenizer, one).count("<|im_end|>") for one in later] == [2, 1]


TAGS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content.split('|')[-1] if not loop.last else m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", [TAGS, TAGS.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")])
def test_generation_tags_say_what_is_trained(template):
    """Also where the tags leave out the end, which is trained all the same."""
    tokenizer = with_template(byte_tokenizer("chatml"), template)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    first = turn("assistant", "x|Blue.")
    (example,) = sft(tokenizer, *ASK, first, turn("user", "More."), RED, turn("user", "Bye."))
    assert tokenizer.decode(example.input_ids).endswith("[user]More.<end>[assistant]Red.<end>")
    assert trained(tokenizer, example) == "Blue.<end>Red.<end>"
    (example,) = sft(tokenizer, *ASK, {**first, "weight": 0}, turn("user", "More."), RED)
    assert trained(tokenizer, example) == "Red.<end>"


def test_an_end_of_a_call_of_a_tool_stays():
    tokenizer = byte_tokenizer("gpt-oss")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|return|>'", "{{ '<|call|>' if m.content == 'call' else '<|return|>'"
    )
    (example,) = sft(tokenizer, *ASK, turn("assistant", "call"))
    assert trained(tokenizer, example).endswith("call<|call|>")


def test_templates_that_refuse_the_question_leave_eos():
    tokenizer = with_template(word_tokenizer(eos_token="<eos>"), "{{ raise_exception('a system message, please') }}")
    note_listed_ends(tokenizer, [3])
    assert turns_of(tokenizer).text == "<eos>"
    assert end_ids(tokenizer, [None, 4]) == [1, 3, 4]
    assert end_ids(word_tokenizer(), [4]) == [4]
    with pytest.raises(ValueError, match="^tokenizer: has no EOS token"):
        turns_of(word_tokenizer())


def test_templates_that_read_parts_end_turns_too():
    tokenizer = byte_tokenizer("gemma")
    parts = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content | trim }}", parts)
    assert turns_of(tokenizer).text == "<end_of_turn>"
    assert trained(tokenizer, sft(tokenizer, *ASK, BLUE)[0]) == "Blue.<end_of_turn>"
