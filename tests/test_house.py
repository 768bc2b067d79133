"""The import rule of rlhf_fast/README.md: imports go down only, in no circle, and GPU code is imported in one place.

And no two test files share a name.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import rlhf_fast

PACKAGE = Path(rlhf_fast.__file__).parent
LAYERS = (
    "presence | failing | extras methods ranks threads | config ops data | lm | rollout exact integrations | "
    "training | stages | plan report | lab | cli world | __main__"
)
LEVEL = {name: level for level, names in enumerate(LAYERS.split("|")) for name in names.split()}
MODULES = {
    ".".join(["rlhf_fast", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if "kernels" not in path.parts
}


def imported(name: str) -> set[str]:
    """Every module that module `name` imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {full if full in MODULES else node.module for full in names}
    return found


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


IMPORTS = {name: imported(name) for name in MODULES}


def test_every_module_stands_on_a_layer():
    assert {room(name) for name in MODULES} - {""} == LEVEL.keys()


def test_imports_go_down():
    up = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if other.startswith("rlhf_fast.") and room(name) and room(other) in LEVEL
        if room(name) != room(other) and LEVEL[room(other)] >= LEVEL[room(name)]
    ]
    assert up == []


def test_no_circle():
    ours = {name: {other for other in others if other in MODULES and other != name} for name, others in IMPORTS.items()}
    TopologicalSorter({name: others - {"rlhf_fast"} for name, others in ours.items() if name != "rlhf_fast"}).prepare()


def test_gpu_code_is_imported_by_the_back_ends_alone():
    theirs = ("triton", "rlhf_fast.kernels", "rlhf_fast._cuda")
    importers = {name for name, others in IMPORTS.items() if any(other.startswith(theirs) for other in others)}
    assert importers and all(name.startswith("rlhf_fast.ops.backends.") for name in importers)


def test_no_two_test_files_share_a_name():
    """pytest imports test files by name, so the second file of a name is an error of collection."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert sorted(set(names)) == names
