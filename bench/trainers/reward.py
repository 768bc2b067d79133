"""The reward of runs on a checkpoint: any text has one, texts differ in it, and a rival's environment can import it."""


def vowels(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The share of vowels among a completion's characters, in [0, 1]."""
    return [sum(map(text.lower().count, "aeiou")) / max(1, len(text)) for text in completions]
