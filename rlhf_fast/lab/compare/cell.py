"""One compared run: `python -m rlhf_fast.lab.compare.cell METHOD CONFIG.json RESULT.json`, a stage in its own process.

RESULT.json says whether it ran or did not fit, with which memory, and what it was made with. It also says what the
process held before any model was loaded, so that peaks can be told from the interpreter's own memory.
"""

import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.config.arguments import from_dict
from rlhf_fast.data.files import write_json
from rlhf_fast.lm.eight_bits import import_bitsandbytes
from rlhf_fast.lm.loading import default_device
from rlhf_fast.methods import METHODS, load
from rlhf_fast.training.console import outlast
from rlhf_fast.training.ending import signals
from rlhf_fast.training.made import made_with
from rlhf_fast.training.memory import current_bytes


def main(method: str, config_file: str, result_file: str) -> None:
    """Train the method with the config of one file; write how it went to the other."""
    given = json.loads(Path(config_file).read_text())
    memory = given.pop("memory")
    device = default_device()
    if memory and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, memory / torch.cuda.get_device_properties(device).total_memory)
        )
    train, config_class = load(METHODS[method].train), load(METHODS[method].config)
    if given["lora_rank"]:
        import_bitsandbytes()
        importlib.import_module("peft")  # part of the process's own memory
    result: dict[str, Any] = {"ran": True, "baseline_bytes": current_bytes(device), "memory": memory}
    config = from_dict(config_class, given, config_file)
    result |= made_with(config)
    try:
        train(config)
    except torch.OutOfMemoryError as error:
        result |= {"ran": False, "error": str(error).partition("\n")[0]}
    write_json(Path(result_file), result)


def end_with(pipe: int) -> None:
    """Ends this process when the process at the other end of the pipe ends, which writes nothing, in whatever way."""

    def wait() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    outlast()
    end_with(sys.stdin.fileno())
    with signals():
        main(*sys.argv[1:])
