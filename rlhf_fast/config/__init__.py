"""The configs: one frozen dataclass per stage, which is the Python argument, the flags and the YAML file at once."""

from rlhf_fast.config.commands import DemoConfig, InitConfig, PairsConfig, PipelineConfig
from rlhf_fast.config.stages import (
    ClippedConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    MethodConfig,
    OfflineConfig,
    OfflineData,
    OnlineConfig,
    OnlineDPOConfig,
    PPOConfig,
    ReinforceConfig,
    ReMaxConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
    StageConfig,
)

__all__ = [
    "ClippedConfig",
    "DPOConfig",
    "DemoConfig",
    "GRPOConfig",
    "InitConfig",
    "KTOConfig",
    "MethodConfig",
    "OfflineConfig",
    "OfflineData",
    "OnlineConfig",
    "OnlineDPOConfig",
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
