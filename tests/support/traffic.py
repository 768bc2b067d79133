"""What two processes send each other in a step of every stage, counted, beside what the formula promises."""

import json
from pathlib import Path
from typing import Any

from bench.ranks import cases
from bench.ranks.command import COUNTED, compared
from tests.support.ranks import launch

STEPS = {"epochs": 2, "minibatches": 2}
COUNTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> stage, shard, further options
    "sft": ("sft", "none", {}),
    "ppo": ("ppo", "none", STEPS),
    "sft in shards": ("sft", "full", {"micro_batch_size": 2}),
    "reward in shards": ("reward", "full", {}),
    "kto in shards": ("kto", "full", {}),
    "ppo in shards": ("ppo", "full", STEPS),
    "remax in shards": ("remax", "full", {"micro_batch_size": 2}),
    "grpo in shards": ("grpo", "full", {}),
    "online-dpo in shards": ("online-dpo", "full", {}),
}


def counted(directory: Path) -> dict[str, dict[str, Any]]:
    """Name -> what `compared` returns; all of them run in one pair of processes."""
    files, specs, options = cases.prepare(cases.TOY, directory, COUNTED), [], {}
    for name, (stage, shard, more) in COUNTS.items():
        wanted = cases.spec(cases.TOY, stage, files, COUNTED, shard=shard, **more)
        options[name] = wanted["options"]
        specs.append(str(cases.write_spec(directory / f"{name.replace(' ', '_')}.json", wanted, count=COUNTED)))
    first, second = launch(2, "-m", "bench.ranks.process", *specs)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    said = [line for line in map(json.loads, first.stdout.splitlines()) if "counts" in line]
    return {
        name: compared(COUNTS[name][0], options[name], line, 2, shards=COUNTS[name][1] != "none")
        for name, line in zip(COUNTS, said, strict=True)
    }
