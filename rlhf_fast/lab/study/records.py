"""The head of every study's JSON: command, date, environment and config."""

import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

from rlhf_fast.data.files import write_json
from rlhf_fast.lm.loading import default_device
from rlhf_fast.training.run import environment


def write_record(path: Path, config: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Writes command, date, environment, config and the content to `path`; returns them."""
    record = {
        "command": "rlhf-fast " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "environment": environment(default_device()),
        "config": vars(config),
        **content,
    }
    write_json(path, record)
    return record
