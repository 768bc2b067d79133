"""Part -> its function, by name: a part's process imports no other part, because imports take GPU time too."""

import pkgutil
from collections.abc import Callable

from bench.gpu.part import Found, Setting

RUNS = {
    "build": "bench.gpu.build:run",
    "smoke": "bench.gpu.smoke:run",
    "exactness": "bench.gpu.tables:run_exactness",
    "ops": "bench.gpu.tables:run_ops",
    "dispatch": "bench.gpu.choice:run",
    "heads": "bench.gpu.tables:run_heads",
    "rollouts": "bench.gpu.decoding:run",
    "methods": "bench.gpu.methods:run",
    "sanitizer": "bench.gpu.sanitizer:run",
}


def load(name: str) -> Callable[[Setting, Found], None]:
    """The function of a part."""
    return pkgutil.resolve_name(RUNS[name])
