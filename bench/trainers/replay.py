"""The first step's completions, as another contender drew them."""

import torch


class Completions:
    """Completions by prompt, in the order in which they were drawn."""

    def __init__(self, path: str) -> None:
        self._by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
        for prompt, completion in torch.load(path):
            self._by_prompt.setdefault(tuple(prompt), []).append(completion)

    def of(self, prompt: list[int]) -> list[int]:
        """The next completion of this prompt. Raises KeyError if the prompt was not drawn."""
        return self._by_prompt[tuple(prompt)].pop(0)
