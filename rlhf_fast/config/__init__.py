"""The configs: one frozen dataclass per stage, which is the Python argument, the flags and the YAML file at once."""

from rlhf_fast.config.stages import (
    DemoConfig,
    DPOConfig,
    GRPOConfig,
    InitConfig,
    OfflineConfig,
    OnlineConfig,
    PairsConfig,
    PipelineConfig,
    PPOConfig,
    ReinforceConfig,
    ReMaxConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
    StageConfig,
)

__all__ = [
    "DPOConfig",
    "DemoConfig",
    "GRPOConfig",
    "InitConfig",
    "OfflineConfig",
    "OnlineConfig",
    "PPOConfig",
    "PairsConfig",
    "PipelineConfig",
    "RLOOConfig",
    "ReMaxConfig",
    "ReinforceConfig",
    "RewardConfig",
    "SFTConfig",
    "StageConfig",
]
