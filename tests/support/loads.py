"""Host memory of all processes of a run while they load a model and put it into shards.

The bytes are the anonymous memory of the processes, and the files in memory that they map, each once. Pages of the
model's files, which the system may drop, do not count, and neither does what other programs share. The counters are
read in a few milliseconds. Pss of smaps_rollup takes so long for a large model that the processes let go of their
weights in the meantime, and the sum over them counts a weight several times.

python -m tests.support.loads WARM MODEL OUT.json    in each process of a launcher, for a model of any size
"""

import json
import os
import pickle
import re
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from rlhf_fast.lm import one_copy
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.sharding import full, shard
from rlhf_fast.ranks import current

EVERY = 0.004  # seconds between two looks
SHARED = re.compile(r"^(\w+)-(\w+) \S+ (\w+) \S+ (\d+) +(?:/memfd:|/dev/shm/)", re.M)


def held(pids: list[int]) -> int:
    """Bytes of the processes, and of the shared memory that they map."""
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    anonymous = sum(int(kb) for text in texts for kb in re.findall(r"^RssAnon:\s+(\d+) kB", text, re.M))
    ends: dict[str, int] = {}  # of every file in memory, by its number: where its last mapping ends
    for pid in pids:
        for start, end, offset, number in SHARED.findall(Path(f"/proc/{pid}/maps").read_text()):
            ends[number] = max(ends.get(number, 0), int(offset, 16) + int(end, 16) - int(start, 16))
    return 1024 * anonymous + sum(ends.values())


def load(path: str) -> PreTrainedModel:
    model = load_policy(path, shard="full")
    shard(model, "full")
    return model


def sums(model: PreTrainedModel) -> dict[str, float]:
    """The sum of every weight. All processes call it."""
    return {name: full(p.detach()).double().sum().item() for name, p in model.named_parameters()}


def measure(warm: str, path: str, out: str, *, again: bool = True) -> None:
    """Writes to `out` the bytes of the model at `path`, and what all processes hold more at the peak and afterwards.

    warm: a small model, which is loaded before, so that imports and thread pools do not count. again: loads `warm` once
    more, as a model that pickle does not take.
    """
    ranks, peaks, done = current(), [0], threading.Event()
    pids = ranks.gather(os.getpid())

    def watch() -> None:
        while not done.wait(EVERY):
            peaks.append(held(pids))

    small = load(warm)
    ranks.wait()
    before, watching = held(pids), threading.Thread(target=watch, daemon=True)
    if ranks.first:
        watching.start()
    ranks.wait()
    model = load(path)
    ranks.wait()
    done.set()
    if ranks.first:
        watching.join()
    after, size = held(pids), sum(p.numel() * p.itemsize for p in model.parameters())
    found = {"model": size, "peak": max(peaks) - before, "after": after - before, "sums": sums(model)}
    if again:
        with patch.object(one_copy.ModelPickler, "dump", side_effect=pickle.PicklingError):
            found["again"] = [sums(small), sums(load(warm))]
    if ranks.first:
        Path(out).write_text(json.dumps(found))
    ranks.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(*sys.argv[1:], again=False)
