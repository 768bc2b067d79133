"""`rlhf-fast demo`: the DPO paper's controlled-sentiment experiment, small enough for a laptop CPU.

Film reviews from a grammar, a Llama-shaped model of a hundred thousand weights, SFT, preference pairs sampled from
the SFT model and labelled by Bradley-Terry on the known true reward, a reward model, then five methods from the same
start on the same prompts. Nothing is downloaded. The report says what each method cost in time and memory and what it
bought in true reward and KL, on prompts that no method saw.
"""

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_fast.config import DemoConfig, PipelineConfig
from rlhf_fast.data.files import write_json
from rlhf_fast.data.rows import write_rows
from rlhf_fast.lab.variance import gradient_variance
from rlhf_fast.lab.world import build_tokenizer, prompt_rows, sft_rows
from rlhf_fast.methods import METHODS
from rlhf_fast.report import pipeline
from rlhf_fast.stages.init import init_model
from rlhf_fast.training.lock import writes_alone

MEASURED = ("ppo", "remax", "reinforce", "rloo")  # methods on whose policies the gradient variance is measured
VARIANCE_NOTE = (
    "Gradient variance: scores are shifted so that the SFT model's samples average 0. Using no baseline is therefore "
    "already close to optimal at the start. From then on the scores rise, and ReMax's greedy baseline rises with "
    "them."
)
TRUE_REWARD = "rlhf_fast.world:true_reward"
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@writes_alone("output_dir")
def run(config: DemoConfig) -> None:
    """Run the whole demo; everything goes to `config.output_dir`, the report to report.html in it."""
    out = Path(config.output_dir)
    shorten = 10 if config.quick else 1
    write_data(out / "data", config.seed, shorten)
    init_model(MODEL, build_tokenizer(), out / "init", config.seed)  # the same each time, so that stages can be reused
    plan = pipeline_config(config, shorten)
    pipeline.run_stages(plan)
    remax = dataclasses.replace(
        pipeline.make_plan(plan)["remax"], reference=str(out / "sft"), eval_data=None, eval_steps=0, resume=False
    )
    variance = {
        where: gradient_variance(dataclasses.replace(remax, model=str(out / model)), batches=max(4, 16 // shorten))
        for where, model in {"SFT model": "sft", **{f"after {METHODS[m].title}": m for m in MEASURED}}.items()
    }
    write_json(out / "variance.json", variance)
    pipeline.write_report(plan, variance=variance, notes=(VARIANCE_NOTE,))


def pipeline_config(config: DemoConfig, shorten: int) -> PipelineConfig:
    """The demo as a pipeline. shorten: divides the numbers of steps and of rows."""
    out = Path(config.output_dir)
    data = out / "data"
    lengths = {"max_prompt_length": 18, "max_response_length": 40}
    methods: dict[str, Any] = {
        "ppo": {"epochs": 2, "minibatches": 2, "learning_rate": 3e-4, "value_learning_rate": 1e-3},
        "dpo": {"batch_size": 32, "learning_rate": 3e-4, "lr_schedule": "linear", "beta": 0.3, "max_length": 64},
    }
    return PipelineConfig(
        model=str(out / "init"),
        output_dir=str(out),
        seed=config.seed,
        resume=config.resume,
        title="Controlled sentiment: five ways to align one language model",
        sft={
            "train_data": str(data / "sft.jsonl"),
            "epochs": 2,
            "batch_size": 32,
            "max_length": 64,
            "max_prompt_length": 18,
            "learning_rate": 3e-3,
            "warmup_steps": 10,
            "lr_schedule": "cosine",
        },
        pairs={
            "prompts": str(data / "prompts.jsonl"),
            "reward": TRUE_REWARD,
            "scale": 30.0,
            "eval_rows": 500 // shorten,
            **lengths,
        },
        reward={
            "epochs": 2,
            "batch_size": 32,
            "max_length": 64,
            "learning_rate": 1e-3,
            "warmup_steps": 10,
            **lengths,
        },
        common={
            "train_data": str(data / "prompts.jsonl"),
            "eval_data": str(data / "eval.jsonl"),
            "eval_reward": TRUE_REWARD,
            "eval_steps": max(1, 10 // shorten),
            "steps": 60 // shorten,
            "batch_size": 64,
            "kl_coef": 0.3,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            **lengths,
        },
        **methods,
    )


def write_data(directory: Path, seed: int, shorten: int) -> None:
    """sft.jsonl, prompts.jsonl and eval.jsonl of the small world; `shorten` divides their lengths."""
    evaluation = prompt_rows(256 // shorten, seed + 1, completions=True)
    training = prompt_rows(6500 // shorten, seed + 2, exclude=[row["prompt"] for row in evaluation])
    files = {"sft.jsonl": sft_rows(6000 // shorten, seed + 3), "prompts.jsonl": training, "eval.jsonl": evaluation}
    for name, rows in files.items():
        write_rows(directory / name, rows)
