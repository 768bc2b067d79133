"""The end of a turn: the one token that an assistant's answer ends in, wherever answers are made, read or scored.

A chat template may end turns in another token than the tokenizer's EOS: `<end_of_turn>` (Gemma), `<|end|>` (Phi-3). The
end is found by writing a conversation with the template:

1. The first special token behind the assistant's text is the end.
2. A template that writes nothing there (GLM) ends a turn by the role of the next turn. The token of a user's turn is
   the end, if the model's generation config lists it among its ends.
3. Otherwise the end is EOS. A text that no template writes ends in EOS too.

Training puts the end, and no second end, behind every finished answer. Rollouts stop at it. They also stop at EOS and
at what the generation config lists, because the model may know these from its own training.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.parts import as_read

_LISTED = "rlhf_fast_listed_ends"
_QUESTION, _ANSWER = "Which colour?", "The colour of the sky."


class Turns(NamedTuple):
    """How a tokenizer's chat template begins and ends the turns of an assistant."""

    end: int  # the token that ends a turn
    text: str  # of this token
    ends: dict[str, int]  # text -> id of every token that may end a turn, `end` and EOS among them
    eos: int
    opening: str  # what the template writes in front of an answer; "" without a template
    before_end: str  # what it writes between the answer's text and the end: a space, for example
    bos: bool  # whether the template writes BOS

    def split(self, text: str, start: int = 0) -> tuple[int, int | None]:
        """(place of the end, id of the end) of a text whose answer begins at `start`.

        White space and ends may follow the end. Without an end the place is where the white space at the end begins,
        and the id is None.
        """
        stop = last = max(start, len(text.rstrip()))
        found: tuple[int, int] | None = None
        while name := next((name for name in self.ends if text.endswith(name, start, stop)), None):
            stop -= len(name)
            if found is None or self.ends[name] == self.end or found[1] != self.end:
                found = stop, self.ends[name]
            while stop > start and text[stop - 1].isspace():
                stop -= 1
        return found or (last, None)

    def begun(self, prompt: str) -> bool:
        """Whether a text is a conversation in the template's form in which an answer has to follow."""
        place = prompt.rfind(self.opening) if self.opening.strip() else -1
        return place >= 0 and not any(name in prompt[place + len(self.opening) :] for name in self.ends)


def note_listed_ends(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Keeps the ends that a model's generation config lists with the model's tokenizer. They are not saved with it."""
    setattr(tokenizer, _LISTED, tuple(ids))


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """How the tokenizer's chat template begins and ends turns. Raises ValueError for a tokenizer without EOS."""
    eos = cast("int | None", tokenizer.eos_token_id)
    if eos is None:
        raise ValueError("tokenizer: has no EOS token; completions have to end in one")
    special = {token.content: n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    listed = {_text_of(n, tokenizer): n for n in getattr(tokenizer, _LISTED, ())}
    name = _text_of(eos, tokenizer)
    plain = Turns(eos, name, {name: eos, **listed}, eos, "", "", False)
    if tokenizer.chat_template is None:
        return plain
    try:
        return _written(plain, tokenizer, special, listed)
    except Exception:  # of the template, which may ask for a system message or for tools
        return plain


def end_ids(tokenizer: PreTrainedTokenizerBase, listed: Iterable[int | None] = ()) -> list[int]:
    """The ids at which a rollout stops: the end of a turn, EOS, and the `listed` ids. Empty where there is none."""
    own = [] if tokenizer.eos_token_id is None else turns_of(tokenizer).ends.values()
    return sorted({n for n in (*listed, *own) if n is not None})


def _written(
    plain: Turns, tokenizer: PreTrainedTokenizerBase, special: dict[str, int], listed: dict[str, int]
) -> Turns:
    def write(*texts: str, **options: Any) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return cast(str, tokenizer.apply_chat_template(as_read(messages, tokenizer), tokenize=False, **options))

    asked, answered = write(_QUESTION, add_generation_prompt=True), write(_QUESTION, _ANSWER)
    _, answer, tail = answered.rpartition(_ANSWER)
    unasked = write(_QUESTION)
    opening = asked.removeprefix(unasked) if asked.startswith(unasked) else ""
    opening = opening or asked.rpartition(_QUESTION)[2]
    ends = {**plain.ends, **listed}
    found = _first(tail, {**special, **ends})
    if found is None:
        tail = write(_QUESTION, _ANSWER, _QUESTION).partition(_ANSWER)[2]
        found = _first(tail, listed)
        found = found if found is not None and not tail[: found[0]].strip() else None
    bos = tokenizer.bos_token
    parts = {
        "opening": opening,
        "bos": bos is not None and asked.startswith(str(bos)),
    }
    if not answer or found is None:
        return plain._replace(**parts)
    place, name = found
    ends[name] = {**special, **ends}[name]
    return plain._replace(end=ends[name], text=name, ends=ends, before_end=tail[:place], **parts)


def _first(text: str, names: Iterable[str]) -> tuple[int, str] | None:
    """The place and the name of the first of `names` in the text; the longest name where several stand there."""
    found = [(text.find(name), -len(name), name) for name in names if name and name in text]
    return (min(found)[0], min(found)[2]) if found else None


def _text_of(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    added = tokenizer.added_tokens_decoder.get(token)
    return added.content if added is not None else cast(str, tokenizer.convert_ids_to_tokens(token))
