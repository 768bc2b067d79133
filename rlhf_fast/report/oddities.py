"""What is odd about a row that a stage would train on, in words that are the same for every row."""

import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.chat import prompt_of
from rlhf_fast.data.examples import Cut, PreferenceExample, PromptExample, RankingExample, SFTExample, UnpairedExample
from rlhf_fast.data.rows import Row
from rlhf_fast.data.turns import Turns

_LOOKED_AT = 40  # letters of a message that are looked for in what the template wrote


class Part(NamedTuple):
    """The prompt with one answer, as token ids."""

    name: str  # of the answer: chosen, rejected, good, ...; "" where a row has one
    prompt: list[int]
    answer: list[int]
    trained: list[bool]  # for each token of the answer


def parts_of(example: Any) -> list[Part]:
    """The prompt with each answer of an example."""
    match example:
        case SFTExample(ids, mask):
            first = mask.index(True)
            return [Part("", ids[:first], ids[first:], mask[first:])]
        case PreferenceExample(prompt, chosen, rejected):
            named = [("chosen", chosen), ("rejected", rejected)]
        case RankingExample(prompt, answers, ranks):
            named = [(f"rank {rank}", answer) for rank, answer in zip(ranks, answers, strict=True)]
        case UnpairedExample(prompt, answer, label):
            named = [("good" if label else "bad", answer)]
        case PromptExample(prompt):
            named = [("", [])]
        case _:
            raise TypeError(f"expected an example, got {type(example).__name__}")
    return [Part(name, prompt, answer, [True] * len(answer)) for name, answer in named]


def oddities(
    row: Row, parts: list[Part], last: list[Part], cut: Cut, tokenizer: PreTrainedTokenizerBase, turns: Turns
) -> list[str]:
    """What is odd about an example of a row. parts: before anything was cut. last: those of the row's last example."""
    found: list[str] = []
    messages = _messages(row, tokenizer)
    ids, ends = parts[0].prompt + parts[0].answer, set(turns.ends.values())
    answers = [part.answer for part in parts if part.answer]
    if any(cut.answers):
        found.append("the answer's end is lost: the row does not teach where to stop")
    elif answers and not all(answer[-1] in ends for answer in answers):
        found.append("marked as cut off: no end is trained")
    if any(len(answer) == 1 and answer[0] in ends for answer in answers):
        found.append("an answer is empty")
    if any(_stops_without_end(part, ends) for part in parts):
        found.append("a turn has no end: the template writes none behind it")
    if len(answers) > len({tuple(answer) for answer in answers}):
        found.append("two answers are equal")
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        found.append("two BOS in front")
    unknown = tokenizer.unk_token_id
    if unknown is not None and any(unknown in part.prompt + part.answer for part in parts):
        found.append("unknown tokens")
    if messages is None and not isinstance(row.get("messages"), list) and turns.begun(str(row["prompt"])):
        found.append("the prompt is a text in the form of the chat template: read as a conversation")
    if messages is not None and row.get("messages") is None and messages[-1]["role"] == "assistant":
        found.append("the prompt is an answer that has begun: the completion goes on in it")
    written = _letters(str(tokenizer.decode(last[0].prompt + last[0].answer)))
    for message in messages or []:
        if row.get("messages") is not None and message["role"] != "assistant" and message is row["messages"][-1]:
            continue  # no answer follows it, so that the row ends before it
        content, role = message.get("content") or "", message["role"]
        if role != "assistant" and _letters(content)[:_LOOKED_AT] not in written:
            found.append(f"the template does not write the text of a message of the role {role}")
    spelled = [message.get("content") or "" for message in messages or []]
    spelled += [] if messages is not None or turns.begun(str(row.get("prompt"))) else [str(row.get("prompt"))]
    for name in tokenizer.all_special_tokens:
        if any(name in text for text in spelled):
            found.append(f"the special token {name} is spelled in the row's text")
    return list(dict.fromkeys(found))


def _messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Row] | None:
    prompt = row["messages"] if row.get("messages") is not None else prompt_of(row, tokenizer)
    return None if isinstance(prompt, str) else prompt


def _stops_without_end(part: Part, ends: set[int]) -> bool:
    """Whether the training stops within the answer at a token that is no end."""
    steps = zip(part.answer, part.trained, part.trained[1:], strict=False)
    return any(on and not following and token not in ends for token, on, following in steps)


def _letters(text: str) -> str:
    return re.sub(r"\s", "", text)
