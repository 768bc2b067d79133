"""Rows that are too long for a model, and ids that it has no embedding for, are errors before the first step."""

import pytest
from transformers import AutoConfig

from rlhf_fast.config import DPOConfig, PairsConfig, PPOConfig, RewardConfig, RLOOConfig, SFTConfig
from rlhf_fast.lm.limits import check_rows, context_length
from rlhf_fast.lm.loading import load_scorer
from rlhf_fast.stages import dpo, pairs, ppo, reward, rloo, sft
from rlhf_fast.stages.init import init_model
from tests.support.models import model_config, random_policy
from tests.support.stages import REWARD, stage_config


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("gpt2", {"n_positions": 128}, 128),
        ("llama", {"max_position_embeddings": 256}, 256),
        ("bloom", {}, None),
        (
            "qwen2",
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                    "rope_theta": 1e6,
                },
            },
            131072,
        ),
    ],
)
def test_context_length(model_type, settings, expected):
    assert context_length(AutoConfig.for_model(model_type, **settings)) == expected


def test_check_rows(tokenizer):
    model = random_policy("gpt2")  # 37 embeddings, 64 positions
    check_rows(model, tokenizer, [[1, 36], [2] * 60], "max_length", response=4)
    check_rows(model, tokenizer, [], "max_length", response=99)
    with pytest.raises(ValueError, match=r"^max_length: expected at most 64 tokens, .* got a row of 60 \+ 5 = 65$"):
        check_rows(model, tokenizer, [[1, 36], [2] * 60], "max_length", response=5)
    token = tokenizer.convert_ids_to_tokens(37)
    with pytest.raises(ValueError, match=f"^model: expected an embedding for every token .* 37 in .*'{token}' with id"):
        check_rows(model, tokenizer, [[1, 37]], "max_length")


@pytest.fixture(scope="module")
def short(tmp_path_factory, tokenizer) -> dict[str, str]:
    """A policy with 28 positions and a reward model with 20."""
    directory = tmp_path_factory.mktemp("short")
    for name, positions in (("policy", 28), ("reward", 20)):
        settings = model_config("gpt2", len(tokenizer)) | {"n_positions": positions}
        del settings["vocab_size"]
        init_model(settings, tokenizer, directory / name, seed=0)
    load_scorer(directory / "reward").save_pretrained(directory / "reward")
    (directory / "reward" / "checkpoint.json").unlink()  # as after an edit by hand
    return {name: str(directory / name) for name in ("policy", "reward")}


LONG = [
    {"prompt": "the film was good . " * 5, "completion": "good ." * 5, "chosen": "good .", "rejected": "the film " * 9}
] * 16


@pytest.mark.parametrize(
    ("module", "cls", "options", "message"),
    [
        (sft, SFTConfig, {"train_data": LONG, "max_prompt_length": 30}, "^max_length: expected at most 28"),
        (sft, SFTConfig, {"eval_data": LONG, "max_prompt_length": 30}, "^max_length: expected at most 28"),
        (dpo, DPOConfig, {"train_data": LONG}, "^max_length: expected at most 28"),
        (reward, RewardConfig, {"train_data": LONG}, "^max_length: expected at most 28"),
        (
            reward,
            RewardConfig,
            {"max_length": 28, "max_response_length": 28},
            "^max_prompt_length, max_response_length",
        ),
        (rloo, RLOOConfig, {"max_response_length": 28}, r"28 tokens, for which the model .* got a row of \d+ \+ 28 ="),
        (rloo, RLOOConfig, {"reward": "short", "max_response_length": 8}, "20 tokens, for which the reward .* has"),
        (
            rloo,
            RLOOConfig,
            {"eval_data": LONG, "max_prompt_length": 20, "max_response_length": 9},
            "for which the reference .* a row of 20",
        ),
        (ppo, PPOConfig, {"value_model": "short", "max_response_length": 8}, "20 tokens, for which the value_model"),
    ],
)
def test_too_long_for_the_model(module, cls, options, message, files, short, tmp_path):
    options = {name: short["reward"] if value == "short" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        module.train(stage_config(cls, files, short["policy"], tmp_path, **options))


def test_too_long_for_the_sampled_pairs(files, short, tmp_path):
    config = PairsConfig(
        model=short["policy"],
        prompts=files["prompts"],
        reward=REWARD,
        output=str(tmp_path / "pairs.jsonl"),
        max_response_length=28,
    )
    with pytest.raises(ValueError, match="for which the model .* got a row of"):
        pairs.sample(config)
