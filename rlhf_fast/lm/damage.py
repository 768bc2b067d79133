"""Which file of a model is damaged, where loading it has failed: transformers' exceptions seldom name the file."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors import SafetensorError, safe_open

from rlhf_fast.data.damage import read_json, sentence

_OTHER = {"preprocessor_config.json", "vocab.json"}  # may be no object, or serve nobody here
Function = TypeVar("Function", bound=Callable[..., Any])


def names_damage(function: Function) -> Function:
    """Decorates a function whose first argument is a model's path: it raises ValueError that names a damaged file."""

    @functools.wraps(function)
    def naming(path: str | Path, *arguments: Any, **options: Any) -> Any:
        try:
            return function(path, *arguments, **options)
        except Exception as error:
            places = [str(place) for place in (Path(path), Path(path).parent) if place.parts]
            if not (isinstance(error, ValueError) and any(place in str(error) for place in places)):
                check_files(path)  # our own errors name the place
            raise

    return cast(Function, naming)


def check_files(path: str | Path) -> None:
    """ValueError for the first file of the model's directory that is no JSON, or no safetensors file, by its name.

    An adapter's base is looked at too. A name on the hub has no directory.
    """
    files = sorted(Path(path).glob("*.json")) + sorted(Path(path).glob("*.safetensors"))
    for file in files:
        if file.suffix == ".json" and file.name not in _OTHER:
            values = read_json(file)
            if file.name == "adapter_config.json" and isinstance(base := values.get("base_model_name_or_path"), str):
                check_files(base)
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file}: expected a safetensors file, but the file is damaged: {sentence(error)}"
                ) from error
