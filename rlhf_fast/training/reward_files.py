"""Files with reward functions as modules that other processes can import too.

A pool of processes is given a function by the name of its module. The file /home/me/my.py is therefore a module of a
name that says where the file is, and importing this package teaches a process to find such modules. A name of its own
also keeps files of one name in two folders apart, and hides no installed package.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

__path__: list[str] = []  # makes this module a package, whose modules `_Finder` finds


class _Finder:
    """Finds the file of a module by its name."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, written = name.rpartition(".")
        if package != __name__:
            return None
        file = Path(bytes.fromhex(written.removeprefix("file_")).decode("utf-8", "surrogateescape"))
        return importlib.util.spec_from_file_location(name, file)


sys.meta_path.append(_Finder)  # pyright: ignore[reportArgumentType]


def load_file(path: Path) -> ModuleType:
    """The module that the file is, read anew. Raises what the file raises."""
    path = path.resolve()
    name = f"{__name__}.file_{str(path).encode('utf-8', 'surrogateescape').hex()}"
    make_importable(path.parent)
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def load_module(name: str) -> ModuleType:
    """The installed module, or the module in the working directory. Raises ImportError where there is none."""
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        make_importable(Path.cwd())  # a console script does not look there
    return importlib.import_module(name)


def make_importable(folder: Path) -> None:
    """Adds the folder to the end of the path, so that no file beside a reward function hides an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
