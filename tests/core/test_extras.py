"""The operations without the extra `[train]`: they import and run, and what needs the extra says so in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast import extras

ROOT = Path(__file__).parents[2]
MODULES = [{"pyyaml": "yaml"}.get(name, name) for name in extras.TRAIN if name != "torch"]
WITHOUT = f"import sys\nsys.modules.update(dict.fromkeys({MODULES}))\n"  # None: an import raises ModuleNotFoundError
LINE = (
    "{} needs jinja2, jsonargparse, matplotlib, plotext, pyyaml, rich, safetensors, tokenizers and transformers: "
    "pip install 'rlhf-fast[train]'"
)


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_pyproject_has_the_same_list():
    text = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^train = \[.*\n((?:    \".*\",\n)+)\]", text, re.MULTILINE)
    listed = [requirement.partition(">=") for requirement in re.findall(r'"(.+)"', block)]
    assert {name: lowest.partition(",")[0] for name, _, lowest in listed} == extras.TRAIN
    assert re.findall(r'^dependencies = (\["torch>=[\d.]+", "numpy"\])', text, re.MULTILINE)


def test_every_operation_runs_without_the_extra():
    """With finders that know no package of the extra. The operations must not even look for one."""
    code = f"""
import importlib, sys
looked_for = []

class Blocked:
    def find_spec(name, *rest):
        if name.partition(".")[0] in {MODULES}:
            looked_for.append(name)
            raise ModuleNotFoundError(name)

import torch
sys.meta_path.insert(0, Blocked)
before = set(sys.modules)
import rlhf_fast
for module in ("rlhf_fast", "rlhf_fast.ops", "rlhf_fast.exact", "rlhf_fast.config"):
    for name in importlib.import_module(module).__all__:
        assert getattr(importlib.import_module(module), name) is not None, name
for name in ("linear", "neural", "experiment", "neural_experiment", "exact", "config"):
    importlib.import_module("rlhf_fast.lab.bandit." + name)
hidden, head, ids = torch.ones(1, 2, 3), torch.zeros(8, 3), torch.ones(1, 2, dtype=torch.long)
loss = rlhf_fast.linear_sft_loss(hidden, head, ids).loss.item()
assert looked_for == [] and not (set(sys.modules) - before) & set({MODULES}), looked_for

from tests.ops.test_operators import samples
calls = [(name, arguments) for name, calls in samples().items() for arguments in calls]
for name, arguments in calls:
    getattr(torch.ops.rlhf_fast, name)(*arguments)
print(len(calls), loss)
try:
    rlhf_fast.exact.causal_lm_logprobs(None, None, rlhf_fast.exact.completions(2, 2))
except ImportError as error:
    print(error)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    numbers, line = done.stdout.splitlines()
    ran, loss = numbers.split()
    assert int(ran) >= 60 and float(loss) == pytest.approx(2.0794415)  # ln 8
    assert line == LINE.format("rlhf_fast.lm")


@pytest.mark.parametrize("module", ["stages.ppo", "training.rewards", "lm.loading", "data.rows", "report.pipeline"])
def test_what_needs_the_extra_says_so_in_one_line(module):
    code = f"""
try:
    import rlhf_fast.{module}
except ImportError as error:
    print(error)
"""
    done = run(WITHOUT + code)
    assert done.stdout == LINE.format(f"rlhf_fast.{module.split('.')[0]}") + "\n", done.stderr


@pytest.mark.parametrize("argv", [["ppo", "--model", "m"], ["--help"], []])
def test_the_command_says_so_in_one_line(argv):
    code = f"from rlhf_fast.__main__ import main\nsys.argv[1:] = {argv}\nsys.exit(main())"
    done = run(WITHOUT + code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rlhf-fast: " + LINE.format("the command") + "\n"


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("transformers", "5.10.2", "transformers >= 5.17 (found 5.10.2)"),
        ("torch", "2.8.0+cpu", "torch >= 2.11 (found 2.8.0+cpu)"),
        ("transformers", "5.17.0.dev0", ""),
        ("transformers", "6.0", ""),
        ("torch", "2.11", ""),
    ],
)
def test_versions_that_are_too_old(monkeypatch, package, version, said):
    monkeypatch.setattr(extras, "_version", lambda name: version if name == package else "99.0")
    extras._lacking.cache_clear()
    try:
        if said:
            with pytest.raises(extras.NotInstalled) as raised:
                extras.need_train("rlhf_fast.stages")
            assert str(raised.value) == f"rlhf_fast.stages needs {said}: pip install 'rlhf-fast[train]'"
        else:
            extras.need_train("rlhf_fast.stages")
    finally:
        extras._lacking.cache_clear()
