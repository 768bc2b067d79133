"""This package as a contender: a stage's `train`, as a user calls it. Run by `compare`."""

from importlib import import_module
from typing import Any

import torch
from turns import Turns

from rlhf_fast import config as configs
from rlhf_fast.stages.online import Experience
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.run import Run


class Reporter(Listener):
    """Reports every step, and saves the first round's completions, so that the others can train on them."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def begin(self, run: Run) -> None:
        """Keep the run, for its models and its meter."""
        self.run = run

    def collected(self, step: int, experience: Experience) -> None:
        """Save the first rollout."""
        if step == 1:
            torch.save(_rows(experience.rollout), self.turns.spec["completions"])

    def log(self, step: int, row: dict[str, Any]) -> None:
        """End a step."""
        if step == 0:  # an evaluation
            return
        models = {role: learner.model for role, learner in self.run.learners.items()}
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        self.turns.end_step(lambda: numbers, models)

    def end(self) -> None:
        """Report the peak memory."""
        self.turns.end(self.run.meter.process_peak())


def main() -> None:
    """Train as the spec on the command line says."""
    turns = Turns.from_command_line("rlhf-fast")
    spec = turns.spec
    config = getattr(configs, spec["ours"]["config"])(**spec["ours"]["options"])
    import_module(f"rlhf_fast.stages.{spec['ours']['stage']}").train(config, listeners=[Reporter(turns)])


def _rows(rollout) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every row, without padding."""
    prompts = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    responses = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [
        (p[p_mask].tolist(), r[r_mask].tolist()) for (p, p_mask), (r, r_mask) in zip(prompts, responses, strict=True)
    ]


if __name__ == "__main__":
    main()
