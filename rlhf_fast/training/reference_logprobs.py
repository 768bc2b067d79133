"""The reference's log-probs of an offline method's rows, kept in a file for the next run.

A file serves a run whose reference has the same weights, whose rows have the same token ids, and whose passes have the
same precision. The file says all three by fingerprints of their content, so that paths and dates mean nothing. It holds
a checksum too. Any other file of this kind, and a damaged one, is written anew; a file of another kind is refused.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.config import DPOConfig, KTOConfig
from rlhf_fast.data.files import check_writable, write_bytes
from rlhf_fast.ranks import current
from rlhf_fast.training.fingerprint import of_values, of_weights

_KIND = "reference log-probs of rlhf_fast"
_OTHER = {
    "of": "another loss",
    "precision": "another precision",
    "reference": "another reference",
    "rows": "other rows",
}


def check_file(path: str | None) -> None:
    """ValueError where `path` holds something else or cannot be written. Call it before models are loaded."""
    if path is not None:
        if Path(path).exists():
            _metadata(Path(path))
        check_writable("reference_logprobs", path)


def reference_logprobs(
    config: DPOConfig | KTOConfig,
    reference: PreTrainedModel,
    rows: Sequence[Any],
    names: Sequence[str],
    compute: Callable[[], dict[str, Tensor]],
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """Name -> log-probs [N] of all rows, on the reference's device: read from config.reference_logprobs, or computed.

    rows: the encoded rows, which JSON can hold. names: of the tensors. compute: makes the tensors. say: prints a line.
    """
    if config.reference_logprobs is None:
        return compute()
    path = Path(config.reference_logprobs)
    wanted = {
        "reference": of_weights(reference),
        "rows": of_values(rows),
        "precision": f"{config.frozen_weights}{' under autocast' if config.bf16 else ''}",
        "of": ", ".join(names),
    }
    if path.exists():
        found = _metadata(path)
        differing = {name for name, value in wanted.items() if found.get(name) != value}
        if "precision" in differing:  # the same weights have another fingerprint then
            differing.discard("reference")
        if not differing:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
            if found.get("checksum") == _checksum(tensors):
                say(f"reference log-probs of {len(rows)} rows are read from {path}")
                return {name: tensor.to(reference.device) for name, tensor in tensors.items()}
        why = " and ".join(text for name, text in _OTHER.items() if name in differing)
        say(f"reference_logprobs: {path} is {f'of {why}' if why else 'damaged'}, and is written anew")
    current().wait()  # because the other processes have to have read the file too
    tensors = compute()
    own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if current().first:
        write_bytes(path, save(own, {"kind": _KIND, "checksum": _checksum(own), **wanted}))
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    found = "a directory"
    if not path.is_dir():
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            metadata, found = {}, f"no safetensors file ({error})"
        else:
            found = f"a safetensors file of {metadata.get('format', 'another kind')}"
        if metadata.get("kind") == _KIND:
            return metadata
    raise ValueError(f"reference_logprobs: expected a file that this option wrote, or none yet, at {path}, got {found}")
