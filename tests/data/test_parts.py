"""Chat templates that read a message in parts, as those of models for text and images do."""

import json

from rlhf_fast.data.encoding import encode_preferences, encode_prompts, encode_sft
from rlhf_fast.data.turns import turns_of
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages.init import train_bpe
from rlhf_fast.training.reading import Conversation, Reader

PARTS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% for part in m.content %}{% if part.type == 'image' %}"
    "{{ '<image>' }}{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXT = PARTS.replace("{% for part in m.content %}{% if part.type == 'image' %}", "").replace(
    "{{ '<image>' }}{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}", "{{ m.content }}"
)
ASKED = [{"role": "user", "content": "the film"}]
ROW = {"prompt": ASKED, "chosen": "good", "rejected": "bad", "completion": "good"}


def tokenizer_of(template):
    tokenizer = train_bpe(["the film was good and bad <user> <assistant>"], 300, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return tokenizer


def test_texts_are_written_as_parts():
    """With the ids of the template that writes the same of texts."""
    parts, text = tokenizer_of(PARTS), tokenizer_of(TEXT)
    begun = {**ROW, "prompt": [*ASKED, {"role": "assistant", "content": "was "}]}
    messages = [{"messages": [*ASKED, {"role": "assistant", "content": "good"}]}]
    for encode, rows in (
        (encode_sft, messages),
        (encode_sft, [ROW]),
        (encode_preferences, [ROW, begun]),
    ):
        assert encode(rows, parts, 99, 99).examples == encode(rows, text, 99, 99).examples
    (prompt,) = encode_prompts([ROW], parts, 99).examples
    assert prompt.prompt == "<user>the film<end>\n<assistant>"
    assert turns_of(parts) == turns_of(text) and turns_of(parts).text == "<end>"
    readers = [Reader(tokenizer, "judge", as_trained=False, context=99) for tokenizer in (parts, text)]
    one, other = (reader.encode([Conversation("", ASKED, {})], ["good"], [False]) for reader in readers)
    assert one == other and parts.decode(one[0][0] + one[0][1]) == "<user>the film<end>\n<assistant>good"


def test_the_template_of_a_processor_is_the_tokenizers_where_it_has_none(tmp_path):
    tokenizer_of(None).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    assert load_tokenizer(tmp_path).chat_template == PARTS
    tokenizer_of(TEXT).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == TEXT
