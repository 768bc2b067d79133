"""One setting's process: it makes a model, says that it is ready, and works whenever its input names a work.

python -m bench.busy.process SPEC     a line `rollout` or `pass` on its input makes a line of JSON on its output
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.rollout import SAMPLED, Loaded, Shape, checkpoint, contenders, untrained
from rlhf_fast.lm.objectives import Objectives


def works(shape: Shape, loaded: Loaded) -> dict[str, Callable[[], object]]:
    """What is timed: a rollout of all prompts, and a training pass, forward and backward, over one rollout's rows."""
    rollout = torch.no_grad()(contenders(shape, loaded)[SAMPLED].run)
    objectives, rows = Objectives(loaded.model), rollout().sampled.sequences

    def training_pass() -> None:
        objectives.logprobs(rows).logprobs.sum().backward()
        loaded.model.zero_grad(set_to_none=True)

    return {"rollout": rollout, "pass": training_pass}


def main() -> None:
    """Work until the input ends."""
    spec = json.loads(sys.argv[1])
    if spec["model"]:
        found = checkpoint(Path(spec["model"]), Path(spec["data"]), "cpu", spec["quick"])
        shape, loaded = next(iter(found.items()))
    else:
        shape = Shape("", spec["config"], *spec["rows"])
        loaded = untrained(shape, "cpu")
    loaded.model.train()
    told = works(shape, loaded)
    for work in told.values():
        work()  # once, so that memory and threads are there
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        told[line.strip()]()
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
