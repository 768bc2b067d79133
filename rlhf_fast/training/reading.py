"""How a reward model reads a conversation: by its own chat template, where that is not the policy's.

The completion's text, without the policy's end of the turn, becomes an assistant message behind the prompt's messages.
After a prompt that ends in an assistant's message, the completion goes on in this message.

- A reward model of somebody else's reads what its template writes, as its makers apply it.
- A reward model that was trained here reads what training wrote: nothing follows the end of the turn.
- A completion that a length limit cut off is written up to its last character, without an end.
- A reward model without a chat template reads plain text: every message on a line of its own, and no roles.

The row's `tools` and `chat_template_kwargs` go to the template; the run's chat_template_kwargs are for the policy's.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.answers import encode_texts, fit_answer
from rlhf_fast.data.chat import prompt_of
from rlhf_fast.data.encoding import encode_answers
from rlhf_fast.data.parts import as_read
from rlhf_fast.data.readers import Row

_MARK = "\ue000end\ue001"  # private characters, which no template strips

Pair = tuple[list[int], list[int]]


class Conversation(str):
    """A prompt's text as the policy's chat template wrote it, with the messages that it was written of."""

    messages: list[Row]
    options: dict[str, Any]  # `tools` and `chat_template_kwargs` of the row

    def __new__(cls, text: str, messages: list[Row], row: Row) -> "Conversation":
        found = super().__new__(cls, text)
        found.messages = messages
        found.options = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
        return found

    @property
    def begun(self) -> bool:
        """Whether the last message is an answer that has begun."""
        return self.messages[-1]["role"] == "assistant"

    def __reduce__(self) -> tuple[Any, ...]:
        return Conversation, (str(self), self.messages, self.options)


class Reader:
    """Encodes conversations for one reward model. Raises ValueError where the template refuses one.

    as_trained: whether the model was trained here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, *, as_trained: bool, context: int) -> None:
        self.tokenizer, self.name, self.as_trained, self.context = tokenizer, name, as_trained, context
        self._warned = False

    def check(self, prompts: Sequence[str]) -> None:
        """ValueError unless the template writes every conversation among `prompts`, which is told before a run."""
        if self.tokenizer.chat_template is not None:
            for prompt in prompts:
                if isinstance(prompt, Conversation):
                    self._write(prompt, "a", True)

    def encode(self, prompts: Sequence[Conversation], texts: Sequence[str], finished: Sequence[bool]) -> list[Pair]:
        """(ids of the prompt, ids of the completion) of every conversation; the prompt gives way to the completion."""
        if self.tokenizer.chat_template is None:
            return self._as_text(prompts, texts, finished)
        if self.as_trained:
            rows: list[Row] = [{"prompt": prompt.messages, **prompt.options} for prompt in prompts]
            answers, ends = [[text] for text in texts], [[end] for end in finished]
            encoded = encode_answers(rows, answers, self.tokenizer, None, sys.maxsize, None, finished=ends)
            pairs = [(prompt, answer) for prompt, (answer,), *_ in encoded]
        else:
            written = [self._write(*row) for row in zip(prompts, texts, finished, strict=True)]
            ids = self.tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
            pairs = [(row[:-1], row[-1:]) for row in cast("list[list[int]]", ids)]
        return [fit_answer(*pair, self.tokenizer, self.context, sys.maxsize) for pair in pairs]

    def _write(self, prompt: Conversation, text: str, finished: bool) -> str:
        from jinja2 import TemplateError

        messages, begun = _turns(prompt)
        answer = begun + text + ("" if finished else _MARK)
        options = {**prompt.options.get("chat_template_kwargs", {}), "tools": prompt.options.get("tools")}
        try:
            turns = as_read([*messages, {"role": "assistant", "content": answer}], self.tokenizer)
            whole = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(f"reward: the chat template of {self.name} refuses a conversation: {error}") from error
        return cast(str, whole).rpartition(_MARK)[0] or cast(str, whole)

    def _as_text(self, prompts: Sequence[Conversation], texts: Sequence[str], finished: Sequence[bool]) -> list[Pair]:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"rlhf_fast: the reward model {self.name} has no chat template, so it reads a conversation as plain "
                "text, a line for each message",
                stacklevel=2,
            )
        plain = []
        for prompt in prompts:
            text, (messages, begun) = prompt_of({"prompt": prompt.messages}, self.tokenizer), _turns(prompt)
            if isinstance(text, str):  # an instruction has a form without a template
                plain.append(text)
                continue
            plain.append("".join(f"{message.get('content') or ''}\n" for message in messages) + begun)
        return encode_texts(plain, list(texts), finished, self.tokenizer, self.context, sys.maxsize)


def _turns(prompt: Conversation) -> tuple[list[Row], str]:
    """The messages before the answer, and the answer's beginning, which the prompt may hold."""
    *before, last = prompt.messages
    return (before, last.get("content") or "") if prompt.begun else (prompt.messages, "")
