"""Conversations as text, written by the tokenizer's chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.forms import Instruction
from rlhf_fast.data.messages import is_trained
from rlhf_fast.data.readers import Row

TemplateOptions = Mapping[str, Any] | None
"""What `chat_template_kwargs` of a config holds: {"enable_thinking": False}, for example."""


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
    completions: list[str | list[Row]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    options: dict[str, Any],
) -> tuple[str, list[str]]:
    """Prompt and completions as text. In a conversation a completion is the text that its messages add."""
    if isinstance(prompt, str):
        return prompt, list(cast(list[str], completions))  # `rows` has checked them
    head = _render(prompt, tokenizer, where, options, add_generation_prompt=True)
    tails = []
    for completion in completions:
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        whole = _render([*prompt, *turns], tokenizer, where, options)
        tails.append(_after(head, whole, where).rstrip())
    return head, tails


def write_turns(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, where: str, options: dict[str, Any]
) -> list[str]:
    """Cuts a rendered conversation into [untrained, assistant turn, untrained, assistant turn, ...].

    The borders of a turn are found by rendering beginnings of the conversation: the messages before the turn with the
    generation prompt, and the messages up to the turn without it. White space that the template writes behind a turn's
    EOS is not trained on. An assistant turn of weight 0 is untrained.
    """
    whole = _render(messages, tokenizer, where, options)
    segments, end = [], 0
    for n, message in enumerate(messages):
        if not is_trained(message):
            continue
        head = _render(messages[:n], tokenizer, where, options, add_generation_prompt=True)
        turn = _render(messages[: n + 1], tokenizer, where, options).rstrip()
        _after(turn, whole, where)
        segments += [head[end:], _after(head, turn, where)]
        end = len(turn)
    return segments


def _after(head: str, whole: str, where: str) -> str:
    if not whole.startswith(head):
        raise ValueError(
            f"{where}: the tokenizer's chat template writes a conversation differently once it goes on, so the trained "
            f"tokens cannot be told apart: expected {whole!r} to start with {head!r}"
        )
    return whole[len(head) :]


def _render(
    messages: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    options: dict[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: has messages, but the tokenizer has no chat template")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error
    return cast(str, text)  # token ids only with tokenize=True
