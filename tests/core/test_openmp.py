"""One OpenMP runtime in the process: torch's, whose threads run the kernels of the compiled core too."""

import subprocess
import sys

CODE = r"""
import os, re
import torch, rlhf_fast
torch.set_num_threads(2)
x = torch.randn(1 << 19)
torch.exp(x)
of_torch = len(os.listdir("/proc/self/task"))
mask = torch.ones(2, 1 << 18, dtype=torch.bool)
rlhf_fast.whiten(x.view(2, -1), mask)
rlhf_fast.token_logprobs(x.view(8, -1), torch.zeros(8, dtype=torch.long))
maps = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps")}
print(os.path.dirname(torch.__file__))
print(of_torch, len(os.listdir("/proc/self/task")), torch.get_num_threads())
print(*(file for file in maps if re.search(r"/lib(gomp|omp|iomp5)\b[^/]*\.so", file)), sep="\n")
"""


def test_one_runtime_and_one_pool():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch, threads, *runtimes = done.stdout.splitlines()
    before, after, wanted = map(int, threads.split())
    assert (before, wanted) == (after, 2), "the core has started threads of its own"
    assert len(runtimes) == 1 and runtimes[0].startswith(torch), runtimes
