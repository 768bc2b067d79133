"""What every compared run starts from: policy, reward model, small critic and data.

For the built-in shapes they are made on the spot.

`demo` is trained (SFT, preference pairs, reward model), so that its rewards mean something. The other shapes have
random weights, which show time and memory only.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from rlhf_fast.config import DemoConfig
from rlhf_fast.data.files import write_json
from rlhf_fast.data.rows import write_rows
from rlhf_fast.lab import demo
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.world import build_tokenizer, sft_rows
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_scorer
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.methods import METHODS, section
from rlhf_fast.ranks import current
from rlhf_fast.report import pipeline
from rlhf_fast.report.reuse import make_stage
from rlhf_fast.stages.init import init_model
from rlhf_fast.training import checkpoint


class Shape(NamedTuple):
    """The configs of a policy and of its small critic, and the number of tokens."""

    policy: dict[str, Any]
    small: dict[str, Any]  # the small critic
    vocabulary: int


def llama(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, **more: Any) -> dict[str, Any]:
    """The config of a Llama-shaped model, embeddings tied."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": True,
        **more,
    }


def _opt(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SHAPES = {
    "10M": Shape(llama(256, 768, 8, 8, 4), llama(128, 384, 4, 4, 2), 8192),
    "60M": Shape(llama(512, 1408, 14, 8, 4), llama(256, 768, 8, 8, 4), 32768),
    "opt-1.3b": Shape(_opt(2048, 8192, 24, 32), _opt(1024, 4096, 24, 16), 50272),
    "llama-2-7b": Shape(llama(4096, 11008, 32, 32, 32, tie_word_embeddings=False), _opt(2048, 8192, 24, 32), 32000),
}
_DEMO_SMALL = {**demo.MODEL, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1}
LORA_RATE = 10  # times the learning rate of full training
_ROWS = 512  # of data for a model with random weights
_NOTE = "made.json"  # says what the models with random weights were made with; written last


class Start(NamedTuple):
    """Directories and files; `options` are the stages' keys that fit them, by section as in a pipeline."""

    model: str
    reward: str
    reward_adapter: str | None  # on the policy's base, for the runs with LoRA
    small_critic: str | None
    prompts: str
    pairs: str | None
    options: dict[str, dict[str, Any]]


def prepare(config: CompareConfig) -> Start:
    """What `config.model` names; a built-in shape is made under `output_dir/start` unless it is there already."""
    out = Path(config.output_dir) / "start"
    if config.model == "demo":
        return _demo(out, config)
    if config.model in SHAPES:
        return untrained(out, SHAPES[config.model], config)
    if not Path(config.model).is_dir():
        raise ValueError(f"model: expected demo, {', '.join(SHAPES)} or a directory, got {config.model!r}")
    for name in ("reward", "train_data"):
        if getattr(config, name) is None:
            raise ValueError(f"{name}: expected a value for a model of your own, got none")
    assert config.reward is not None and config.train_data is not None
    return Start(
        config.model,
        config.reward,
        config.reward_adapter,
        config.small_critic,
        config.train_data,
        config.pairs,
        {},
    )


def _demo(out: Path, config: CompareConfig) -> Start:
    seed = config.seeds[0]
    plan = demo.pipeline_config(DemoConfig(output_dir=str(out), seed=seed, resume=True), 1)
    if current().first:
        (out / _NOTE).unlink(missing_ok=True)  # the demo's reward model takes the place of another shape's
        demo.write_data(out / "data", seed, 1)
        tokenizer = build_tokenizer()
        for name, model in (("init", demo.MODEL), ("small", _DEMO_SMALL)):
            init_model(model, tokenizer, out / name, seed)
    current().wait()
    stages = pipeline.make_plan(plan)
    pipeline.run_stages(plan, pipeline.BEFORE_METHODS)
    adapter = str(out / f"reward_lora{config.lora_rank}") if config.lora_rank else None
    if adapter:
        lora = {"output_dir": adapter, "lora_rank": config.lora_rank}
        lora |= {"learning_rate": LORA_RATE * stages["reward"].learning_rate}
        make_stage("reward", dataclasses.replace(stages["reward"], **lora))
    options = {method: getattr(plan, section(method)) for method in METHODS}
    lengths = {"prompt_length": 18, "response_length": 40}
    common = {k: v for k, v in plan.common.items() if k not in ("train_data", "steps", "batch_size")}
    return Start(
        str(out / "sft"),
        str(out / "reward"),
        adapter,
        str(out / "small"),
        str(out / "data" / "prompts.jsonl"),
        stages["pairs"].output,
        options | {"common": common | lengths},
    )


def untrained(out: Path, shape: Shape, config: CompareConfig) -> Start:
    """Models of a shape with random weights, and rows of the lengths that `config` says, made in `out`."""
    adapter = out / f"reward_lora{config.lora_rank}" if config.lora_rank else None
    if current().first:
        _write_untrained(out, shape, config, adapter)
    current().wait()
    # a random policy has no EOS to speak of and drifts with any learning rate: the weights are hardly moved
    common = {"learning_rate": 1e-7, "lr_schedule": "constant"}
    policy, reward, small, prompts, pairs = (
        str(out / name) for name in ("policy", "reward", "small", "prompts.jsonl", "pairs.jsonl")
    )
    return Start(policy, reward, str(adapter) if adapter else None, small, prompts, pairs, {"common": common})


def _write_untrained(out: Path, shape: Shape, config: CompareConfig, adapter: Path | None) -> None:
    """The models, and the prompts and pairs. adapter: the directory of a reward model with LoRA."""
    length = config.prompt_length + config.response_length
    tokenizer = _padded(build_tokenizer(), shape.vocabulary)
    positions = {"max_position_embeddings": max(2048, length)}
    made = {"seed": config.seeds[0], **shape._asdict(), **positions}
    if not (out / _NOTE).is_file() or json.loads((out / _NOTE).read_text()) != made:
        (out / _NOTE).unlink(missing_ok=True)
        for stale in out.glob("reward_lora*"):
            shutil.rmtree(stale)
        for name, model in (("policy", shape.policy), ("small", shape.small)):
            init_model(model | positions, tokenizer, out / name, config.seeds[0])
        _write_reward_model(out / "policy", out / "reward", None)
        write_json(out / _NOTE, made)
    texts = sft_rows(_ROWS, 1)
    prompts = [_stretched(row["prompt"], config.prompt_length, tokenizer) for row in texts]
    answers = [_stretched(row["completion"], config.response_length - 1, tokenizer) for row in texts]
    pairs = zip(prompts, answers, answers[1:] + answers[:1], strict=True)
    write_rows(out / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_rows(out / "pairs.jsonl", [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs])
    if adapter and not adapter.is_dir():
        _write_reward_model(out / "policy", adapter, LoRA(config.lora_rank, 16.0, 0))


def _padded(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([f"<{i}>" for i in range(vocabulary - len(tokenizer))])
    return tokenizer


def _stretched(text: str, tokens: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text over and over, as long as the budget."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stretched = tokenizer.decode((ids * (tokens // len(ids) + 1))[:tokens])
    assert isinstance(stretched, str)  # of a batch it would be a list
    return stretched


def _write_reward_model(policy: Path, reward: Path, lora: LoRA | None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_scorer(policy, lora=lora)
    checkpoint.save(reward, models={"": model}, tokenizer=load_tokenizer(policy), state=None, extra_files={})
