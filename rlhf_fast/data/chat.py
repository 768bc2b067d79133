"""Conversations as text, written by the tokenizer's chat template, and which of their characters are trained.

A text is written as a whole, so that it can be tokenized as a whole. The last end of a text is left out, because a cut
off answer has none; `turns` says what an end is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_fast.data.forms import Instruction
from rlhf_fast.data.messages import is_trained
from rlhf_fast.data.parts import as_read
from rlhf_fast.data.readers import Row
from rlhf_fast.data.turns import Turns

TemplateOptions = Mapping[str, Any] | None
"""What `chat_template_kwargs` of a config holds: {"enable_thinking": False}, for example."""
_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Text(NamedTuple):
    """A prompt and an answer, or a conversation, as one text."""

    text: str  # without its end
    spans: list[tuple[int, int]]  # the trained characters: from, up to
    end: int | None  # the token behind the text; None: a length limit cut the text off


class Prompt(NamedTuple):
    """A row's prompt and its answers. Every answer stands behind the prompt in a text of its own."""

    text: str
    answers: list[Text]
    bos: bool  # whether BOS is put in front where the text has none; a chat template says itself whether BOS is there


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template of a Jinja file, or with the template itself; None changes nothing.

    A tokenizer saves its template with it. Raises ValueError for text that is neither a file nor a template.
    """
    if template is not None:
        text = str(template)
        if "{{" not in text and "{%" not in text:
            if not Path(text).is_file():
                raise ValueError(f"chat_template: expected a Jinja file or a template, found no file {text}")
            text = Path(text).read_text(encoding="utf-8-sig")
        tokenizer.chat_template = text
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        except TemplateSyntaxError as error:
            reason = f"a syntax error in line {error.lineno}: {error.message}"
            raise ValueError(f"chat_template: expected a Jinja template, got {reason}") from error
        except Exception:  # the template refuses this message; the rows decide
            return tokenizer
    return tokenizer


def prompt_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> str | list[Row]:
    """The row's prompt: text, or the messages that a chat template writes."""
    prompt = row["prompt"]
    return prompt.text if isinstance(prompt, Instruction) and tokenizer.chat_template is None else prompt


def options_of(row: Row, options: TemplateOptions) -> dict[str, Any]:
    """What the chat template gets beside a row's messages: the row's tools and options, then the run's options."""
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {**(options or {}), **(row.get("chat_template_kwargs") or {}), **tools}


def write_prompt(
    prompt: str | list[Row],
    completions: Sequence[str | list[Row]],
    finished: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    turns: Turns,
    where: str,
    options: dict[str, Any],
) -> Prompt:
    """A prompt and its completions, each `finished` by an end or cut off.

    In a conversation a completion is what its messages add to the text of the prompt. A prompt that ends in an
    assistant's message is an answer that has begun, and the completion goes on in it.
    """
    if isinstance(prompt, str):
        texts = cast(Sequence[str], completions)  # `rows` has checked them
        return write_text(prompt, texts, finished, turns)
    begun = prompt[-1]["role"] == "assistant"
    head = _render(prompt, tokenizer, where, options, continued=begun, open=not begun)
    answers = []
    for completion, done in zip(completions, finished, strict=True):
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        whole = _render(_joined(prompt, messages) if begun else [*prompt, *messages], tokenizer, where, options)
        border = _border(head, whole, prompt, begun, tokenizer, where, options)
        answers.append(_ended(whole, border, done, turns))
    return Prompt(head, answers, False)


def write_text(prompt: str, completions: Sequence[str], finished: Sequence[bool], turns: Turns) -> Prompt:
    """A prompt and completions that are texts. Where the prompt has the form of the template, so has the answer."""
    chat = turns.begun(prompt)
    own = turns if chat else turns._replace(end=turns.eos)
    answers = []
    for completion, done in zip(completions, finished, strict=True):
        whole, border = prompt + completion, len(prompt)
        place, end = own.split(whole, border)
        place = len(whole) if end is None else place
        answers.append(Text(whole[:place], [(border, place)], (own.end if end is None else end) if done else None))
    return Prompt(prompt, answers, turns.bos if chat else True)


def write_turns(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, turns: Turns, where: str, options: dict[str, Any]
) -> list[Text]:
    """A conversation as texts in which every assistant turn is trained once, up to its end. Weight 0: not trained.

    - A template with {% generation %} says itself what is trained: one text.
    - A template that writes a conversation as a continuation of its beginning: one text. The borders of a turn are
      found by writing the messages before the turn with the generation prompt, and the messages up to the turn.
    - Other templates (those that drop the reasoning of earlier turns): a text for each turn that is written otherwise
      once the conversation goes on. The text ends in this turn, and is trained there.
    """
    if tokenizer.chat_template is not None and _TAGS.search(tokenizer.get_chat_template(tools=options.get("tools"))):
        tagged = _by_tags(messages, tokenizer, turns, where, options)
        if tagged is not None:
            return [tagged]
    left = [n for n, message in enumerate(messages) if is_trained(message)]
    written = {n: _turn(messages[: n + 1], tokenizer, turns, where, options) for n in left}
    rows: list[Text] = []
    while left:
        *earlier, last = left
        whole, spans, end = written[last][0]
        inside = [n for n in earlier if whole.startswith(written[n][1])]
        own = [written[n][0].spans[0] for n in inside]
        rows.append(Text(whole, [(a, b + _end_length(whole[b:], turns)) for a, b in own] + spans, end))
        left = [n for n in earlier if n not in inside]
    return rows[::-1]


def _turn(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, turns: Turns, where: str, options: dict[str, Any]
) -> tuple[Text, str]:
    """The messages up to an assistant turn, which is trained; and the same with its end, where the template has one."""
    before = messages[:-1]
    head = _render(before, tokenizer, where, options, open=True)
    whole = _render(messages, tokenizer, where, options)
    border = _border(head, whole, before, False, tokenizer, where, options)
    text = _ended(whole, border, True, turns)
    return text, whole[: len(text.text) + _end_length(whole[len(text.text) :], turns)]


def _ended(whole: str, border: int, finished: bool, turns: Turns) -> Text:
    """What a template wrote, without the end and what follows the end."""
    place, end = turns.split(whole, border)
    text = whole[:place]
    if not finished:
        text = text.removesuffix(turns.before_end) if len(text) - len(turns.before_end) >= border else text
    return Text(text, [(border, len(text))], (turns.end if end is None else end) if finished else None)


def _end_length(text: str, turns: Turns) -> int:
    """How far the end reaches into the text that follows a turn; 0 where no end follows."""
    blank = len(text) - len(text.lstrip())
    name = next((name for name in (turns.text, *turns.ends) if text.startswith(name, blank)), None)
    return 0 if name is None else blank + len(name)


def _by_tags(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, turns: Turns, where: str, options: dict[str, Any]
) -> Text | None:
    """The conversation, trained within {% generation %}; None where weights of 0 cannot be told to their turns."""
    whole, places = _render_tagged(messages, tokenizer, where, options)
    spoken = [message for message in messages if message["role"] == "assistant"]
    trained = list(map(is_trained, spoken))
    if not all(trained):
        if len(places) != len(spoken):
            return None
        places = [place for place, on in zip(places, trained, strict=True) if on]
    if not places:
        raise ValueError(f"{where}: the chat template has {{% generation %}}, but marks nothing of these messages")
    # Tags that leave out the end would teach a model never to stop.
    spans = [
        (a, b if turns.split(whole[:b], a)[1] is not None else b + _end_length(whole[b:], turns)) for a, b in places
    ]
    last = _ended(whole[: spans[-1][1]], spans[-1][0], True, turns)
    return Text(last.text, [*spans[:-1], *last.spans], last.end)


def _joined(prompt: list[Row], answer: list[Row]) -> list[Row]:
    """The messages, the first of the answer being the rest of the prompt's last message."""
    last, first = prompt[-1], answer[0]
    text = (last.get("content") or "") + (first.get("content") or "")
    return [*prompt[:-1], {**last, **first, "content": text}, *answer[1:]]


def _border(
    head: str,
    whole: str,
    before: list[Row],
    begun: bool,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    options: dict[str, Any],
) -> int:
    """Where the answer begins in `whole`: behind `head`, as far as `whole` begins like it.

    A template may open an answer by <think> and write an answer without reasoning without it. The messages in front of
    the answer have to be the same in both.
    """
    if whole.startswith(head):
        return len(head)
    border = len(commonprefix([head, whole]))
    history = head if begun or not before else commonprefix([_render(before, tokenizer, where, options), head])
    if border < len(history.rstrip()):
        raise ValueError(
            f"{where}: the tokenizer's chat template writes the messages before an answer differently once the answer "
            f"follows, so the trained tokens cannot be told apart: expected {whole!r} to start with {head!r}"
        )
    return border


def _render(
    messages: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    options: dict[str, Any],
    *,
    open: bool = False,
    continued: bool = False,
) -> str:
    """open: with the generation prompt. continued: up to the end of the last message's text, as it goes on."""
    kinds = {"add_generation_prompt": open, "continue_final_message": continued}
    with _errors_of(tokenizer, where):
        text = tokenizer.apply_chat_template(as_read(messages, tokenizer), tokenize=False, **kinds, **options)
    return cast(str, text)  # token ids only with tokenize=True


def _render_tagged(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, where: str, options: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation, and the places of what stands in {% generation %}."""
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    given = as_read(given, tokenizer)
    with _errors_of(tokenizer, where):
        (text,), (places,) = render_jinja_template(
            [given],
            chat_template=tokenizer.get_chat_template(tools=options.get("tools")),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **options},
        )
    return text, [(int(start), int(stop)) for start, stop in places if stop > start]


@contextmanager
def _errors_of(tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[None]:
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: has messages, but the tokenizer has no chat template")
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error
