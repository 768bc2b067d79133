"""Saving a model in the Hugging Face layout: safetensors beside their config, or an adapter in peft's format.

A model in shards is saved a file at a time. All processes put the weights of the file together in the first process,
which writes them. The first process thus never holds the whole model. A file has about a gigabyte, and a decoder layer
is in one file.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.data.files import write_json
from rlhf_fast.lm import adapters
from rlhf_fast.lm.noise import as_before
from rlhf_fast.lm.parked import whole
from rlhf_fast.lm.sharding import gathered, is_saved_from_parts, pieces_of
from rlhf_fast.ranks import current

FILE_BYTES = 1 << 30  # of the weights in a file, where a model in shards is saved
# Holds what the config says of an adapter's scores, because transformers writes no config.json beside an adapter.
ADAPTER_SCORE = "score.json"
_SCORE_NOTES = ("score_offset", "score_at_end_of_turn")
# The attribute of a model that keeps its processor's files, because a checkpoint to resume from may be gone at the end.
FILES = "rlhf_fast_files"


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """`save_pretrained`. Of a model with an adapter it saves the adapter alone, in peft's format.

    Where `sharding.is_saved_from_parts`, all processes call it, and what fails in one fails in all.
    """
    with as_before(model), nullcontext() if adapters.has_adapter(model) else whole(model):
        if is_saved_from_parts(model):
            _save_from_parts(model, directory)
            if not current().first:
                return
        else:
            model.save_pretrained(directory, state_dict=adapters.own_weights(model))
    if not adapters.has_adapter(model):
        for name, content in getattr(model, FILES, {}).items():
            (directory / name).write_bytes(content)
    notes = {name: getattr(model.config, name) for name in _SCORE_NOTES if hasattr(model.config, name)}
    if adapters.has_adapter(model) and notes:
        (directory / ADAPTER_SCORE).write_text(json.dumps(notes) + "\n")


def _save_from_parts(model: PreTrainedModel, directory: Path) -> None:
    """Writes model.safetensors, or several files and their index."""
    pieces, error, index, size = pieces_of(model, FILE_BYTES), None, {}, 0
    for number, piece in enumerate(pieces, 1):
        state = gathered(piece)  # by all processes, also after an error
        if state is None or error is not None:
            continue
        try:
            if len(pieces) == 1:
                model.save_pretrained(directory, state_dict=state)
                continue
            file = directory / f"model-{number:05}-of-{len(pieces):05}.safetensors"
            _save_piece(model, state, file)
            with safe_open(file, "pt") as written:
                index |= dict.fromkeys(written.keys(), file.name)
            size += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in state.values()}.values())
            if number == len(pieces):
                values = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
                write_json(directory / "model.safetensors.index.json", values)
        except Exception as raised:
            error = raised
    current().same_error(error)


def _save_piece(model: PreTrainedModel, state: dict[str, Tensor], file: Path) -> None:
    """Writes these weights alone to `file`, under the names that files have; config and code stand beside it."""
    place = file.parent / ".piece"
    model.save_pretrained(place, state_dict=state, max_shard_size="100000GB")
    for written in list(place.iterdir()):
        os.replace(written, file if written.suffix == ".safetensors" else file.parent / written.name)
    place.rmdir()
