"""What every try starts from: a tiny model, its rows, a command per target, and each target's uninterrupted run.

The models have two layers of width 16, so that a stage takes half a second and a try costs little.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from bench.trust import child, mutations
from bench.trust.equal import differences
from bench.trust.kind import Lost
from rlhf_fast.data.rows import write_rows
from rlhf_fast.lab.world import build_tokenizer, preference_rows, prompt_rows, sft_rows
from rlhf_fast.methods import METHODS, STAGES, load
from rlhf_fast.stages.init import init_model

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TRUE_REWARD = "rlhf_fast.world:true_reward"
STAGE_TARGETS = tuple(STAGES)
HEAVY = {
    "pipeline",
    "over pipeline",
    "compare",
    "demo",
    "study",
    "remax long",
    "ppo long",
    "sft long",
}  # a run takes ten stages' time, or imports torch anew
TARGETS = ("pairs", *STAGE_TARGETS, "exact study", "pipeline", "compare", "demo", "study")
LENGTHS = {"max_prompt_length": 12, "max_response_length": 6, "max_length": 24}


class Baseline(NamedTuple):
    """An uninterrupted run: where its results lie, how many mutations it made, how long it took."""

    directory: Path
    mutations: int
    seconds: float


class World:
    """The models and rows of a campaign, made in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer()
        for name, seed in (("model", 0), ("other_model", 1)):
            init_model(MODEL, tokenizer, root / name, seed)
        wide = {**MODEL, "hidden_size": 32, "intermediate_size": 64}
        init_model(wide, tokenizer, root / "wide_model", 2)
        for prefix, seed in (("", 0), ("other_", 7)):
            for name, rows in _rows(seed).items():
                write_rows(root / f"{prefix}{name}.jsonl", rows)
        (root / "reward.py").write_text(REWARD)
        (root / "pipeline.yaml").write_text(yaml.safe_dump(self.pipeline()))
        self._baselines: dict[str, Baseline] = {}

    def stage(self, stage: str, **options: object) -> list[str]:
        """The command of a stage without its output_dir; options: of its config."""
        row = STAGES[stage]
        fields = {field.name for field in dataclasses.fields(load(row.config))}
        data = {"sft": "sft", "preference": "pairs", "prompt": "prompts", "unpaired": "unpaired"}[row.rows]
        values: dict[str, object] = {
            "model": str(self.root / "model"),
            "train_data": str(self.root / f"{data}.jsonl"),
            "batch_size": 4,
            "steps": 4,
            "save_steps": 1,
            "learning_rate": 3e-3,
            "lr_schedule": "constant",
            "group_size": 2,
            "normalize_samples": 4,
            **LENGTHS,
        }
        if row.online:
            values |= {"reward": f"{self.root}/reward.py:score", "eval_data": str(self.root / "eval.jsonl")}
        values = {name: value for name, value in values.items() if name in fields} | options
        return [stage, *_flags(values)]

    def command(self, target: str) -> list[str]:
        """The command of a target without the flag of its output."""
        if target in STAGES:
            return self.stage(target)
        if target == "pairs":
            values = {"model": str(self.root / "model"), "prompts": str(self.root / "prompts.jsonl")}
            values |= {"reward": f"{self.root}/reward.py:score", "eval_rows": 3}
            return ["pairs", *_flags(values | {name: LENGTHS[name] for name in list(LENGTHS)[:2]})]
        if target == "pipeline":
            return ["pipeline", "--config", str(self.root / "pipeline.yaml")]
        if target == "demo":
            return ["demo", "--quick"]
        if target == "exact study":
            values = {"seeds": 2, "vocab_size": 3, "length": 2, "pairs": 16, "steps": 2, "batch_size": 4}
            return ["study", "exact", *_flags(values)]
        if target == "study":
            values = {"pipeline": str(self.root / "pipeline.yaml"), "seeds": 2, "workers": 1}
            return ["study", "winrate", *_flags(values), "--methods", "ReMax", "DPO"]
        assert target == "compare", target
        own = {name: str(self.root / f"{file}.jsonl") for name, file in (("train_data", "prompts"), ("pairs", "pairs"))}
        values = {"model": str(self.root / "model"), "reward": f"{self.root}/reward.py:score", **own}
        values |= {"steps": 3, "batch_size": 4, "prompt_length": 12, "response_length": 6}
        return ["compare", *_flags(values), "--methods", "remax", "dpo"]

    def start(self, target: str, out: Path, *more: str, resume: bool = False) -> Callable[[], int]:
        """The action of a target that writes to `out`."""
        return self.action(target, self.command(target), out, *more, resume=resume)

    def action(self, target: str, command: list[str], out: Path, *more: str, resume: bool = False) -> Callable[[], int]:
        """The action of a command of this target that writes to `out`. A target without --resume is begun again."""
        flags = {"study": ["--out", str(out)], "exact study": ["--out", str(out)]}.get(target)
        if target == "pairs":
            flags = ["--output", f"{out}/pairs.jsonl.gz", "--eval-output", f"{out}/pairs_eval.jsonl"]
        flags = flags or ["--output-dir", str(out)]
        again = ["--resume"] if resume and target not in ("pairs", "exact study", "study") else []
        run = child.rlhf_fast([*command, *flags, *again, *more])

        def action() -> int:
            if target == "demo":
                _shrink_demo()
            return run()

        return action

    def baseline(self, target: str, *more: str) -> Baseline:
        """The uninterrupted run of a target with these further flags, made at the first call."""
        key = " ".join([target, *more])
        if key not in self._baselines:
            directory = self.root / "baselines" / str(len(self._baselines))
            out = directory / "out"
            begin, run = mutations.count(out, directory / "ledger"), self.start(target, out, *more)
            ended = child.run(lambda: (begin(), run())[1], directory / "log")
            if ended.code:
                raise Lost(f"the uninterrupted run of {key} ended with exit code {ended.code}: {ended.output[-600:]}")
            self._baselines[key] = Baseline(out, mutations.number_of(directory / "ledger"), ended.seconds)
        return self._baselines[key]

    def must_equal(self, out: Path, wanted: Path, ignoring: frozenset[str] = frozenset()) -> None:
        """Raises Lost where `out` does not hold what `wanted` holds. ignoring: keys of JSON files."""
        if found := differences(out, wanted, ignoring=ignoring):
            raise Lost(f"expected the results of an uninterrupted run, but {'; '.join(found)}")

    def pipeline(self) -> dict[str, object]:
        """The config of the pipeline: SFT, pairs, a reward model, ReMax and DPO, each of two steps."""
        rows = {name: str(self.root / f"{name}.jsonl") for name in ("sft", "prompts", "eval")}
        lengths = {name: LENGTHS[name] for name in ("max_prompt_length", "max_response_length")}
        reward = f"{self.root}/reward.py:score"
        common = {"train_data": rows["prompts"], "eval_data": rows["eval"], "eval_reward": reward, "batch_size": 4}
        return {
            "model": str(self.root / "model"),
            "output_dir": str(self.root / "unused"),
            "methods": ["remax", "dpo"],
            "sft": {"train_data": rows["sft"], "batch_size": 4, "max_length": 24, "save_steps": 2},
            "pairs": {"prompts": rows["prompts"], "reward": reward, "eval_rows": 3, **lengths},
            "reward": {"batch_size": 4, "normalize_samples": 4, "save_steps": 1, **lengths},
            "common": {**common, "steps": 2, "save_steps": 1, "learning_rate": 1e-3, **lengths},
        }


def _rows(seed: int) -> dict[str, list[dict]]:
    rows = sft_rows(16, seed)
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    pairs = preference_rows(prompts, list(zip(completions, completions[1:] + completions[:1], strict=True)), seed)
    labelled = [
        {"prompt": row["prompt"], "completion": row["completion"], "label": i % 2 == 0} for i, row in enumerate(rows)
    ]
    wanted = prompt_rows(16, seed + 1, completions=True)
    return {"sft": rows, "pairs": pairs, "unpaired": labelled, "prompts": prompt_rows(12, seed + 2), "eval": wanted[:4]}


def _flags(values: dict[str, object]) -> list[str]:
    """The flags of a config's values."""
    flags = []
    for name, value in values.items():
        text = json.dumps(value) if isinstance(value, bool) else str(value)
        flags += [f"--{name.replace('_', '-')}", text]
    return flags


REWARD = '''"""Counts words, and more for `good`."""


def score(prompts, completions):
    return [0.1 * len(c.split()) + ("good" in c.split()) for c in completions]
'''


def _shrink_demo() -> None:
    """In a child: the demo's model, rows and steps become tiny."""
    from rlhf_fast.lab import demo

    plan, write = demo.pipeline_config, demo.write_data

    def smaller(config, shorten: int):
        whole = plan(config, shorten)
        common = whole.common | {"batch_size": 8, "steps": 2, "eval_steps": 1}
        return dataclasses.replace(
            whole,
            common=common,
            pairs=(whole.pairs or {}) | {"eval_rows": 8},
            reward=(whole.reward or {}) | {"normalize_samples": 8},
        )

    demo.MODEL.update(MODEL, max_position_embeddings=128)
    demo.pipeline_config = smaller
    demo.write_data = lambda directory, seed, shorten: write(directory, seed, shorten * 10)


def copy(source: Path, target: Path) -> Path:
    """A copy of a directory, whose files keep their times."""
    shutil.copytree(source, target, symlinks=True)
    return target


def warm() -> None:
    """Imports what the targets import, so that a fork has it."""
    for name in ("report.pipeline:run", "stages.pairs:sample", "lab.demo:run", "lab.compare.command:run"):
        load(name)
    load("lab.study.exact_frontier:run")
    for row in STAGES.values():
        load(row.train), load(row.config)
    load("lm.loading:load_policy")
    import torch.distributed.fsdp  # noqa: F401, of models in shards

    assert METHODS
