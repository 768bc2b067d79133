"""The stubs _cpu.pyi and _cuda.pyi have the modules' names, and the headers' arguments in the headers' order."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast import _cpu

ROOT = Path(__file__).resolve().parents[2]
TYPES = {
    "Pointer": "int",
    "int": "int",
    "int64_t": "int",
    "double": "float",
    "bool": "bool",
    "const std::array<int64_t, 6>&": "Sequence[int]",
    "void": "None",
}


def stub(module: str) -> ast.Module:
    return ast.parse((Path(rlhf_fast.__file__).parent / f"{module}.pyi").read_text())


def names(module: str) -> set[str]:
    """What the stub declares: functions, and variables with a type."""
    declared = {node.name for node in stub(module).body if isinstance(node, ast.FunctionDef)}
    return declared | {node.target.id for node in stub(module).body if isinstance(node, ast.AnnAssign)}


def header(path: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Each function of a C++ header: its result and its arguments as (name, type), in Python's types."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / path).read_text())
    found = {}
    for result, name, arguments in re.findall(r"(\w+) (\w+)\(([^)]*)\);", text):
        each = (" ".join(x.split()).rpartition(" ") for x in re.split(r",(?![^<]*>)", arguments))
        found[name] = TYPES[result], [(argument, TYPES[kind]) for kind, _, argument in each]
    return found


def test_the_cpu_stub_has_the_module_s_names():
    assert names("_cpu") == {name for name in dir(_cpu) if not name.startswith("_")}


@pytest.mark.skipif(importlib.util.find_spec("rlhf_fast._cuda") is None, reason="built without nvcc")
def test_the_cuda_stub_has_the_module_s_names():
    from rlhf_fast import _cuda

    assert names("_cuda") == {name for name in dir(_cuda) if not name.startswith("_")}


@pytest.mark.parametrize("module, path", [("_cpu", "cpu/ops.h"), ("_cuda", "cuda/ops.h")])
def test_a_stub_has_the_header_s_arguments(module, path):
    functions = {node.name: node for node in stub(module).body if isinstance(node, ast.FunctionDef)}
    declared = header(path)
    assert len(declared) == {"_cpu": 27, "_cuda": 19}[module]
    assert functions.keys() - {"isa", "isas", "set_isa", "bf16_units", "bf16_unit"} == declared.keys()
    for name, (result, arguments) in declared.items():
        given = functions[name].args
        assert [(x.arg, ast.unparse(x.annotation)) for x in given.posonlyargs] == arguments, name
        assert (given.args, ast.unparse(functions[name].returns)) == ([], result), name
        assert len(ast.get_docstring(functions[name]).splitlines()) == 1, name
