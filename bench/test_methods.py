"""A few steps of every method under pytest-benchmark, on the demo's model: `pytest bench --benchmark-only`.

A stage is timed as a user calls it, loading and saving included. The extra info holds the median step and the peak
memory by the stage's own meter. The stage stops where the log-probs of a rollout differ from those of training, so
nothing wrong is timed. `rlhf-fast compare` has other models, LoRA, the reward reached and plots.
"""

import json
import statistics
from pathlib import Path

import pytest

from bench.trainers import cases
from rlhf_fast.data.rows import write_rows
from rlhf_fast.lab.world import preference_rows, prompt_rows, sft_rows
from rlhf_fast.methods import METHODS, load

STEPS = 5
CASES = {
    "PPO": ("ppo", {"epochs": 1}),
    "PPO, value head on the policy's trunk": ("ppo", {"epochs": 1, "critic": "shared"}),
    "ReMax": ("remax", {}),
    "REINFORCE": ("reinforce", {}),
    "RLOO": ("rloo", {"group_size": 4}),
    "GRPO": ("grpo", {"group_size": 4, "epochs": 1}),
    "DPO": ("dpo", {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo's SFT and reward models."""
    return cases.prepare(tmp_path_factory.mktemp("start") / "models")


def data(method: str, rows: int) -> list[dict[str, object]]:
    """Prompts or pairs for STEPS steps."""
    prompts = prompt_rows(STEPS * rows, seed=2)
    if METHODS[method].online:
        return prompts
    endings = [row["completion"] for row in sft_rows(len(prompts) + 1, seed=1)]
    return preference_rows([row["prompt"] for row in prompts], list(zip(endings, endings[1:], strict=False)), 0)


@pytest.mark.parametrize("name", CASES)
def test_method(benchmark, models, name, tmp_path, request):
    """The time of a whole stage."""
    method, own = CASES[name]
    rows = 8 if request.config.getoption("quick") else 64
    options = {"model": models["sft"], "train_data": str(tmp_path / "data.jsonl"), "max_prompt_length": 18, **own}
    if not METHODS[method].online:
        rows //= METHODS[method].sequences  # two completions a pair
        options |= {"max_length": 64}
    else:
        options |= {"reward": models["reward"], "max_response_length": 40, "steps": STEPS}
    write_rows(options["train_data"], data(method, rows))
    train, config_class = load(METHODS[method].train), load(METHODS[method].config)
    outputs: list[Path] = []

    def fresh() -> tuple[tuple, dict]:
        outputs.append(tmp_path / str(len(outputs)))
        return (config_class(output_dir=str(outputs[-1]), batch_size=rows, **options),), {}

    benchmark.group = f"{STEPS} steps"
    benchmark.pedantic(train, setup=fresh, rounds=3)
    steps = [json.loads(line) for line in (outputs[-1] / "metrics.jsonl").read_text().splitlines()]
    benchmark.extra_info["seconds a step"] = statistics.median(row["time/step"] for row in steps[1:])
    run = json.loads((outputs[-1] / "run.json").read_text())
    benchmark.extra_info["peak bytes"] = max(
        phase["peak_bytes"] for phase in run["phases"].values() if isinstance(phase, dict)
    )
