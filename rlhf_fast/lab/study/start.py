"""Where the studies of trained language models start: per seed an SFT model, preference pairs and a reward model.

They come from a pipeline's stages before its methods: the embedded sentiment world's, as `rlhf-fast demo` runs them, or
those of any `rlhf-fast pipeline` config. All seeds share the data; a seed has its own weights, order of rows, pairs,
reward model and rollouts. Everything of a seed lies in `<out>/seed-<n>`, and what is there already is not run again.
"""

import dataclasses
from pathlib import Path

import yaml

from rlhf_fast.config import DemoConfig, PipelineConfig
from rlhf_fast.config.arguments import check_file, from_dict
from rlhf_fast.lab import demo
from rlhf_fast.lab.world import build_tokenizer
from rlhf_fast.methods import section
from rlhf_fast.report import pipeline
from rlhf_fast.stages.init import init_model


def pipeline_of(config_file: str | None, out: str | Path, seed: int, *, shorten: int = 1) -> PipelineConfig:
    """The pipeline of one seed: that of the YAML file, or the embedded world's with its steps divided by `shorten`.

    Raises ValueError, naming the file, for a config that no pipeline could run.
    """
    directory = str(Path(out) / f"seed-{seed}")
    if config_file is None:
        config = demo.pipeline_config(DemoConfig(output_dir=directory, seed=seed, resume=True), shorten)
        return dataclasses.replace(config, **_sections(config, Path(out) / "data"))
    check_file(PipelineConfig, config_file)
    values = yaml.safe_load(Path(config_file).read_text())
    config = from_dict(PipelineConfig, values, config_file)
    for name in ("sft", "reward"):
        if getattr(config, name) is None:
            raise ValueError(f"{config_file}: {name}: expected a section, because every study starts there, got null")
    return dataclasses.replace(config, output_dir=directory, seed=seed, resume=True)


def prepare(config: PipelineConfig, *, embedded: bool) -> None:
    """Runs SFT, pairs and reward model of one seed; of the embedded world also the model they start from.

    Its data have to be there: `demo.write_data(<out>/data, 0)`.
    """
    if embedded:
        init_model(demo.MODEL, build_tokenizer(), Path(config.model), config.seed)
    pipeline.run_stages(config, pipeline.BEFORE_METHODS)


def _sections(config: PipelineConfig, data: Path) -> dict[str, dict]:
    """The sections that differ from the demo's: data in a directory that all seeds share, more passes for DPO."""
    return {
        "sft": (config.sft or {}) | {"train_data": str(data / "sft.jsonl")},
        "pairs": config.pairs | {"prompts": str(data / "prompts.jsonl")},
        # after one pass DPO is far from done; the demo has no time for more
        "dpo": getattr(config, section("dpo")) | {"epochs": 3},
        "common": config.common | {"train_data": str(data / "prompts.jsonl"), "eval_data": str(data / "eval.jsonl")},
    }
