"""This package as a contender: a stage's `train`, as a user calls it. Run by `compare`."""

from importlib import import_module

import torch
from turns import Turns

from rlhf_fast import config as configs
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.training import meter
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.run import Run


def main() -> None:
    turns = Turns.from_command_line("rlhf-fast")
    spec = turns.spec
    end_step, collect, reset = Run.end_step, Online.collect, meter.reset_high_water_mark

    def with_turns(run: Run, step: int, metrics: dict[str, float]) -> None:
        end_step(run, step, metrics)
        models = {role: learner.model for role, learner in run.learners.items()}
        turns.end_step(lambda: {name: float(value) for name, value in metrics.items()}, models)

    def recorded(online: Online, meter: Meter, step: int) -> Experience:
        """The first step's completions, for the others to train on the same."""
        experience = collect(online, meter, step)
        if step == 1:
            torch.save(_rows(experience.rollout), spec["completions"])
        return experience

    def noted() -> bool:
        turns.note_peak()
        return reset()

    Run.end_step, Online.collect, meter.reset_high_water_mark = with_turns, recorded, noted
    config = getattr(configs, spec["ours"]["config"])(**spec["ours"]["options"])
    import_module(f"rlhf_fast.stages.{spec['ours']['stage']}").train(config)
    turns.end()


def _rows(rollout) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every row, without padding."""
    prompts = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    responses = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [
        (p[p_mask].tolist(), r[r_mask].tolist()) for (p, p_mask), (r, r_mask) in zip(prompts, responses, strict=True)
    ]


if __name__ == "__main__":
    main()
