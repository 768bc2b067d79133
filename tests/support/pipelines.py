"""A small config of a whole pipeline for tests."""

from rlhf_fast.config import PipelineConfig
from tests.support.stages import REWARD


def pipeline_config(files, tiny_model, output, **options) -> PipelineConfig:
    lengths = {"max_prompt_length": 16, "max_response_length": 12}
    common = {"train_data": files["prompts"], "eval_data": files["prompts"], "eval_steps": 1, "eval_reward": REWARD}
    values = {
        "model": tiny_model,
        "output_dir": str(output),
        "seed": 5,
        "sft": {"train_data": files["sft"], "batch_size": 16, "max_length": 48},
        "pairs": {"prompts": files["prompts"], "reward": REWARD, "eval_rows": 4, **lengths},
        "reward": {"batch_size": 8, "normalize_samples": 8, **lengths},
        "common": {**common, "steps": 2, "batch_size": 8, **lengths},
        "rloo": {"group_size": 2},
    }
    return PipelineConfig(**{**values, **options})
