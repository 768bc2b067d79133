"""Who samples: this process, or a vLLM server; and what corrects for the difference between their log-probs."""

from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from rlhf_fast.config.fields import arg

SamplerName = Literal["local", "vllm"]
Mismatch = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Transfer = Literal["files", "nccl"]
TIMEOUT, PATIENCE = 600.0, 120.0  # seconds
COLDEST = 0.01
"""The lowest temperature that vLLM samples at; it takes a lower one for this one, or for greedy decoding."""


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Who samples from the policy."""

    sampler: SamplerName = arg("local", "Who samples: this process, or the vLLM server at vllm_url.")
    vllm_url: str | None = arg(
        None, "Address of the server that `rlhf-fast vllm-command` tells how to start: http://127.0.0.1:8000."
    )
    vllm_timeout: float = arg(TIMEOUT, "Seconds that the server may take for an answer.", above=0)
    vllm_patience: float = arg(
        PATIENCE, "Seconds during which a request that fails is made again, before the run ends.", at_least=0
    )
    vllm_transfer: Transfer = arg("files", "How weights go to the server: files that it can read, or NCCL (GPUs).")


def check_url(url: str) -> None:
    """ValueError unless `url` is the address of a server."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        fits = fits and parts.username is None and not parts.query
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise ValueError(f"vllm_url: expected an address such as http://127.0.0.1:8000, got {url!r}")


def check_sampler(config: Any) -> None:
    """ValueError where the options of the sampler contradict each other, or where a vLLM server cannot honour them."""
    if config.sampler == "local":
        unset_values = {"vllm_url": None, "vllm_timeout": TIMEOUT, "vllm_patience": PATIENCE, "vllm_transfer": "files"}
        for name, unset in unset_values.items():
            if getattr(config, name) != unset:
                raise ValueError(f"{name}: expected sampler vllm beside it, got {getattr(config, name)} with local")
        return
    if config.vllm_url is None:
        raise ValueError("vllm_url: expected the address of a server, such as http://127.0.0.1:8000, got none")
    check_url(config.vllm_url)
    if config.vllm_transfer == "nccl" and getattr(config, "lora_rank", 0):
        raise ValueError("vllm_transfer: expected files with lora_rank, because an adapter is a small file; got nccl")
    for name, off in (("top_k", 0), ("top_p", 1)):
        if getattr(config, name, off) != off:
            raise ValueError(
                f"{name}: expected {off} with sampler vllm, because the server does not return the kept tokens that "
                f"training needs; got {getattr(config, name)}"
            )
    if config.temperature < COLDEST:
        raise ValueError(f"temperature: expected {COLDEST} or more with sampler vllm, got {config.temperature}")
