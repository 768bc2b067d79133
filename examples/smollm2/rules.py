"""The reward of the second run: does an answer keep the rule that its prompt states? Code can check every rule."""

import re

RULES = {
    "short": "Answer in at most 12 words.",
    "sentence": "Answer in exactly one sentence.",
    "list": "Answer with a numbered list of three items.",
}


def _short(answer: str) -> float:
    """1.0 up to 12 words, then 12 divided by the number of words."""
    return min(1.0, 12 / len(answer.split()))


def _sentence(answer: str) -> float:
    """1 divided by the number of sentences; a beginning without an end counts as two."""
    ends = len(re.findall(r"[.!?](?=\s|$)", answer))
    return 1 / (ends if answer[-1] in ".!?" else ends + 2)


def _list(answer: str) -> float:
    """The share of three lines, or of all lines where there are more, that begin with 1., 2. and 3. in this order."""
    lines = answer.splitlines()
    return sum(bool(re.match(rf"{n}\. *\w", line)) for n, line in enumerate(lines[:3], 1)) / max(3, len(lines))


_CHECKS = {"short": _short, "sentence": _sentence, "list": _list}


def keeps_rule(completions: list[str], rule: list[str], **_: object) -> list[float]:
    """In [0, 1]: 1.0 for an answer that keeps its rule, less the further it is from that, 0.0 for no answer."""
    answers = [completion.strip() for completion in completions]
    return [_CHECKS[name](answer) if answer else 0.0 for name, answer in zip(rule, answers, strict=True)]
