"""Importing bitsandbytes without its look-up on the hub.

On CPUs with AVX-512 bf16, bitsandbytes loads a kernel for products with 4-bit weights from the hub as it is imported,
where the package `kernels` is installed, and else warns that it found none. Nothing here multiplies 4-bit weights, so
the import is made to go without. peft imports bitsandbytes too.
"""

import importlib
import logging
import sys
from importlib.util import find_spec

_ASKS = "bitsandbytes.backends.cpu.ops"  # the module that asks the hub, and the name of its logger


def import_bitsandbytes() -> None:
    """Imports bitsandbytes where it is installed. A broken installation is for the caller's own import to tell."""
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger(_ASKS)
    level, kernels = logger.level, {name: sys.modules.pop(name) for name in ("kernels",) if name in sys.modules}
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]  # Python's way to say that there is none
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("bitsandbytes")
    except Exception:
        pass
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        sys.modules.update(kernels)
