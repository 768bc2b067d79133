"""A run writes to no directory that it reads, because the run would then read what it has written itself."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_fast.config import StageConfig
from rlhf_fast.config.stages import KINDS
from rlhf_fast.lm import adapters


def check_apart(config: Any) -> None:
    """ValueError where output_dir is a directory that the run reads.

    A stage's output_dir may not hold its models either, because a run that begins anew deletes old checkpoints. Nor may
    it be in a directory of rows, because its own files would then be rows.
    """
    out = os.path.realpath(config.output_dir)
    for name, kind in KINDS.items():
        value = getattr(config, name, None)
        for one in value if isinstance(value, list | tuple) else [value]:
            if kind == "template" or not isinstance(one, str | Path) or not Path(one).is_dir():
                continue
            paths = [str(one)]
            if kind != "rows" and adapters.is_adapter(one):
                with suppress(ValueError):  # an adapter that cannot be loaded, of which the stage that loads it tells
                    paths.append(adapters.base_path(one))
            for read in [os.path.realpath(path) for path in paths]:
                outer, inner = (read, out) if kind == "rows" else (out, read)
                within = isinstance(config, StageConfig) and Path(inner).is_relative_to(outer)
                if read == out or within:
                    where = "it" if read == out else read
                    raise ValueError(
                        f"output_dir: expected a directory that the run does not read, got {config.output_dir}, but "
                        f"{name} reads {where}"
                    )
