"""The reward of the second run: does an answer keep the rule that its prompt states? Code can check every rule."""

import re

RULES = {
    "one sentence": "Answer in one sentence of at most 15 words.",
    "list": "Answer with a list of exactly three lines. Each line starts with a dash.",
    "capitals": "Answer in at most 20 words. Write all of them in CAPITAL LETTERS.",
    "quotes": 'Answer in at most 20 words. Put the whole answer in "double quotes".',
}


def _at_most(text: str, limit: int) -> float:
    """1 up to `limit` words, then less by the share of words too many."""
    count = len(text.split())
    return limit / count if count > limit else 1.0


def _one_sentence(text: str) -> float:
    ends = len(re.findall(r"[.!?](?=\s|$)", text))
    return _at_most(text, 15) * (ends == 1 and text[-1] in ".!?" and "\n" not in text)


def _list(text: str) -> float:
    lines = text.split("\n")
    return sum(bool(re.match(r"- \S", line)) for line in lines) / max(3, len(lines))


def _capitals(text: str) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    return _at_most(text, 20) * sum(map(str.isupper, letters)) / max(1, len(letters))


def _quotes(text: str) -> float:
    inside = len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]
    return _at_most(text, 20) * inside


_CHECKS = {"one sentence": _one_sentence, "list": _list, "capitals": _capitals, "quotes": _quotes}


def keeps_rule(completions: list[str], rule: list[str], **_: object) -> list[float]:
    """1.0 for an answer that keeps its rule whole, less for an answer that keeps a part of the rule, 0.0 for no answer."""
    answers = [completion.strip() for completion in completions]
    return [_CHECKS[name](answer) if answer else 0.0 for name, answer in zip(rule, answers, strict=True)]
