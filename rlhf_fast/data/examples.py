"""What encoding makes of rows: a class for every kind of row, and what encoding took away."""

from typing import NamedTuple

from rlhf_fast.data.readers import Row


class SFTExample(NamedTuple):
    """A row of kind sft."""

    input_ids: list[int]
    mask: list[bool]  # for each token; True: trained on


class PreferenceExample(NamedTuple):
    """A row of kind preference. The prompt is followed by the chosen or by the rejected answer."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None


class RankingExample(NamedTuple):
    """A row of kind ranking."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    ranks: list[int]  # of each completion; 0 is best


class UnpairedExample(NamedTuple):
    """A row of kind unpaired."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool  # whether the completion is good
    unrelated: tuple[list[int], list[int]]  # the prompt again, and the completion of a row with another prompt


class PromptExample(NamedTuple):
    """A row of kind prompt."""

    prompt_ids: list[int]
    prompt: str  # the whole prompt as text (chat template applied), also where prompt_ids was truncated
    columns: Row  # the other columns of the row, for reward functions
    own: tuple[list[int], list[int]] | None = None  # the prompt again, and the row's own completion to compare with


class Cut(NamedTuple):
    """What an example lost, in tokens."""

    row: int  # the number of its row, from 0; a conversation may make several examples
    prompt: int = 0  # from the left end of the prompt
    answers: tuple[int, ...] = ()  # from the right end of every answer


class Encoded(NamedTuple):
    """Encoded rows."""

    examples: list  # of one of the classes above
    cuts: list[Cut]  # one for each example

    @property
    def truncated(self) -> int:
        """Examples that lost tokens."""
        return sum(bool(cut.prompt or any(cut.answers)) for cut in self.cuts)

    @property
    def cut_prompts(self) -> int:
        """Examples that lost the left end of their prompt."""
        return sum(cut.prompt > 0 for cut in self.cuts)

    @property
    def cut_answers(self) -> int:
        """Examples that lost the right end of an answer."""
        return sum(any(cut.answers) for cut in self.cuts)
