"""Messages in the form that a chat template reads: texts, or lists of parts.

A template of a model for text and images (SmolVLM's, LLaVA's) writes a message part by part. Of a message that is a
text it would write nothing, or it would fail. A trial on each template tells.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.readers import Row

_TRIED = "rlhf_fast_reads_parts"  # the attribute of a tokenizer: (template, whether it reads parts alone)
_WORD = "colour"


def as_read(messages: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The messages with every text as a part, where the tokenizer's template reads parts alone."""
    if not _reads_parts(tokenizer):
        return messages
    return [
        {**message, "content": _part(message["content"])} if isinstance(message.get("content"), str) else message
        for message in messages
    ]


def _reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    template, found = getattr(tokenizer, _TRIED, (None, False))
    if template != tokenizer.chat_template:
        found = not _writes(_WORD, tokenizer) and _writes(_part(_WORD), tokenizer)
        setattr(tokenizer, _TRIED, (tokenizer.chat_template, found))
    return found


def _writes(content: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return _WORD in str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception:  # whatever the template says to this content
        return False


def _part(text: str) -> list[Row]:
    return [{"type": "text", "text": text}]
