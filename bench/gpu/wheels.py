"""The wheels that an image lacks: what the hour imports, less what `pip freeze` says of the image, by `pip download`.

The list of packages is here and nowhere else. What a wheel needs itself is read from its metadata, for the image's
Python, and fetched too; what the image has is not. So no second torch comes along as the need of another package.
"""

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion

NEEDED = (
    "torch>=2.11", "triton", "numpy", "transformers>=5.17", "safetensors", "tokenizers", "rich", "matplotlib",
    "pyyaml", "jsonargparse", "jinja2", "plotext>=5.3,<6",  # the stages
    "pybind11>=2.13", "ninja>=1.11", "setuptools>=77",  # the build
    "pytest", "hypothesis", "pytest-xdist", "expecttest", "packaging",  # smoke and sanitizer
    "trl==1.16.0", "liger-kernel==0.8.5",  # the rivals
)  # fmt: skip
PLATFORMS = ("manylinux_2_39", "manylinux_2_35", "manylinux_2_34", "manylinux_2_31", "manylinux_2_28")
PLATFORMS += ("manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def installed(freeze: str) -> dict[str, str]:
    """Package -> version, from the output of `pip freeze` or `pip list`; "" where the line names none."""
    found = {}
    for line in freeze.splitlines():
        match = re.match(r"([A-Za-z0-9][\w.-]*)\s*(?:==|\s)?\s*(\d[\w.+!]*)?", line.strip())
        if match and not line.startswith(("#", "-", "Package ")):
            found[canonicalize_name(match[1])] = match[2] or ""
    return found


def missing(needed: Sequence[str], have: Mapping[str, str], environment: Mapping[str, str]) -> list[Requirement]:
    """What is needed in this environment, and is not there or is of another version; an unknown version will do."""
    lacking = []
    for text in needed:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": "", **environment}):
            continue
        version = have.get(canonicalize_name(requirement.name))
        if version is None or (version and not _fits(requirement, version)):
            lacking.append(requirement)
    return lacking


def _fits(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return True


def pip_download(requirement: Requirement, directory: Path, python: str, machine: str) -> None:
    """One wheel, without what it needs. Raises ValueError where pip finds none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(directory)]
    command += [part for name in PLATFORMS for part in ("--platform", f"{name}_{machine}")]
    done = subprocess.run([*command, f"{requirement.name}{requirement.specifier}"], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"--wheels: pip found no wheel of {requirement}: {done.stderr.strip().splitlines()[-1:]}")


def needs_of(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def fetch(
    directory: Path,
    have: Mapping[str, str],
    python: str,
    machine: str = "x86_64",
    download: Callable[[Requirement, Path, str, str], None] = pip_download,
) -> list[str]:
    """Downloads what is missing, and what that needs; the names and versions of the wheels."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": machine, "implementation_name": "cpython"}
    there, queue, fetched = dict(have), missing(NEEDED, have, environment), []
    directory.mkdir(parents=True, exist_ok=True)
    while queue:
        requirement = queue.pop(0)
        before = set(directory.glob("*.whl"))
        download(requirement, directory, python, machine)
        wanted = canonicalize_name(requirement.name)
        wheel = next(
            path for path in [*(set(directory.glob("*.whl")) - before), *before]
            if parse_wheel_filename(path.name)[0] == wanted
        )  # fmt: skip
        there[wanted] = str(parse_wheel_filename(wheel.name)[1])
        fetched.append(f"{wanted}=={there[wanted]}")
        queued = {canonicalize_name(each.name) for each in queue}
        lacking = missing(needs_of(wheel), there, environment)
        queue += [each for each in lacking if canonicalize_name(each.name) not in queued]
    return fetched
