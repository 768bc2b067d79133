"""A part in a process of its own: `python -m bench.gpu.child PART SETTING.json FOUND.json`."""

import json
import sys
from pathlib import Path

from bench.gpu.part import Found, Setting
from bench.gpu.runs import load


def main(name: str, setting_file: str, found_file: str) -> None:
    """Runs the part; exit code 1 where something was wrong."""
    given = json.loads(Path(setting_file).read_text())
    setting = Setting(given["dry"], Path(given["scratch"]), Path(given["results"]))
    found = Found(Path(found_file))
    found.write()
    import torch

    torch.manual_seed(0)
    load(name)(setting, found)
    if setting.device == "cuda":
        torch.cuda.synchronize()  # an error of the last launch is this part's
    found.write()
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
