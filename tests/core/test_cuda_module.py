"""rlhf_fast._cuda on a machine without a GPU or a driver: it loads, and the back end "cuda" has every kernel."""

import importlib.util
import subprocess
import sys

import pytest

from rlhf_fast import _cpu

if importlib.util.find_spec("rlhf_fast._cuda") is None:
    pytest.skip("the compiled core was built without nvcc", allow_module_level=True)


CPU_ALONE = {"decode_attention", "matmul_bf16", "bf16_unit", "bf16_units"}  # and these; a GPU runs torch's own
CPU_ALONE |= {name + end for name in ("packed_attention", "add_rms_norm", "swiglu") for end in ("", "_backward")}


def names(module):
    return {name for name in dir(module) if not name.startswith("_")}


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_loads_without_torch_and_has_the_kernels_of_the_cpu():
    path = importlib.util.find_spec("rlhf_fast._cuda").origin
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(*(name for name in dir(module) if not name.startswith("_")))
"""
    assert python(code) - {"scratch_bytes", "sample_tile"} == names(_cpu) - {"isa", "isas", "set_isa"} - CPU_ALONE


REGISTERED = """
import torch
{force}
import rlhf_fast.ops
from rlhf_fast.ops import dispatch
print(*(operator for operator in dispatch.KERNELS[{backend!r}]))
"""


def test_a_torch_with_cuda_registers_every_operator():
    forced = REGISTERED.format(force="torch.version.cuda = '13.0'", backend="cuda")
    assert python(forced) == python(REGISTERED.format(force="", backend="cpu"))


def test_a_torch_without_cuda_does_not_load_the_module():
    code = """
import sys, torch
torch.version.cuda = None
import rlhf_fast.ops
print(*(name for name in sys.modules if "cuda" in name and "rlhf" in name))
"""
    assert python(code) == set()
