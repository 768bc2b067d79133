"""Which back end runs: the override, a core that was not built, a core that does not load."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast.ops
from rlhf_fast.ops import dispatch


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter: the choice is made at import."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


HIDE = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "rlhf_fast._cpu" else find_spec(name, *rest)
"""
BREAK = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "rlhf_fast._cpu":
            raise ImportError("libgomp.so.1: undefined symbol")
sys.meta_path.insert(0, Finder())
"""
LOSS = """
import torch, rlhf_fast
x = torch.tensor([[0.5, -1.0]], requires_grad=True)
rlhf_fast.reinforce_loss(x, torch.ones(1), x < 9).backward()
print(x.grad.tolist())
"""


def test_missing_core_runs_the_reference_and_warns_once():
    done = python("import warnings; warnings.simplefilter('always')" + HIDE + LOSS + LOSS)
    assert done.stdout.split("\n")[:2] == ["[[-0.5, -0.5]]"] * 2, done.stderr
    assert done.stderr.count("rlhf_fast._cpu is not built") == 1


def test_broken_core_is_an_error():
    done = python(BREAK + LOSS)
    assert done.returncode != 0 and "undefined symbol" in done.stderr


def test_environment_variable():
    code = "import torch; from rlhf_fast.ops import dispatch; print(dispatch.has_kernel('gae', torch.zeros(1)))"
    assert python(code, RLHF_FAST_BACKEND="reference").stdout == "False\n"
    done = python(code, RLHF_FAST_BACKEND="gpu")
    assert "RLHF_FAST_BACKEND: expected one of reference, cpu, triton, cuda, got 'gpu'" in done.stderr


def test_context_manager(monkeypatch):
    """The kernel runs by default; inside `backend("reference")` it does not, and afterwards it does again."""
    calls = []

    class Core:
        def __getattr__(self, name):
            calls.append(name)
            return lambda *arguments: None

    monkeypatch.setattr(rlhf_fast.ops.returns, "_cpu", Core())
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with rlhf_fast.ops.backend("reference"):
        rlhf_fast.ops.gae(x, x, mask)
    assert calls == []
    rlhf_fast.ops.gae(x, x, mask)
    with rlhf_fast.ops.backend("cpu"):
        rlhf_fast.ops.whiten(x, mask)
    assert calls == ["gae", "whiten"]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_listens_sees_the_operator():
    """Modes, profiler, transforms and subclasses; all others go to the kernel without torch's dispatcher."""
    x, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    losses = lambda x: rlhf_fast.reinforce_loss(x, x.detach(), mask)  # noqa: E731
    with Seen() as seen:
        losses(x)
        rlhf_fast.whiten(x, mask)
    assert {"rlhf_fast.reinforce_loss.default", "rlhf_fast.whiten.default"} <= set(seen.names)
    with torch.profiler.profile() as profile:
        losses(x)
    assert "rlhf_fast::reinforce_loss" in {event.name for event in profile.events()}
    leaf = torch.nn.Parameter(x)
    plain, seen = [], dispatch._is_plain

    def is_plain(args):
        plain.append(seen(args))
        return plain[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_is_plain", is_plain)
        losses(x), losses(leaf).backward()
        assert plain == [True, True]
        with torch.inference_mode():
            losses(torch.randn(2, 3))
        losses(torch._neg_view(x)), losses(x.as_subclass(Subclass)), torch.func.vmap(losses)(x[None])
        assert plain[2:] == [False] * 4
    assert torch.equal(losses(torch._neg_view(x)), losses(-x))
    assert torch.equal(leaf.grad, -leaf.detach() / 6)


class Subclass(torch.Tensor):
    pass


def test_one_list_of_names():
    """Every name of the list is there in both places, and every public operation and result is in the list."""
    ops = rlhf_fast.ops
    assert ops.__all__ == ["backend", *rlhf_fast.__all__] and len(set(rlhf_fast.__all__)) == len(rlhf_fast.__all__)
    assert all(getattr(rlhf_fast, name) is getattr(ops, name) for name in rlhf_fast.__all__)
    theirs = {
        name
        for name, value in vars(ops).items()
        if callable(value) and getattr(value, "__module__", "").startswith("rlhf_fast.") and not name.startswith("_")
    }
    assert theirs == set(ops.__all__)


def test_constants_that_ask_for_gradients_get_none():
    x = torch.randn(2, 3, requires_grad=True)
    out = rlhf_fast.reinforce_loss(x.detach(), x, torch.ones(2, 3, dtype=torch.bool))
    assert not out.requires_grad


CPU_ONLY = ("packed_attention", "add_rms_norm", "swiglu")


def test_triton_has_every_kernel():
    """And operators made of others run on every back end. For attention torch has kernels on GPUs."""
    on_cpu = {name for name in dispatch.KERNELS["cpu"] if name.removesuffix("_backward") not in CPU_ONLY}
    assert on_cpu == set(dispatch.KERNELS["triton"])


def test_triton_takes_cpu_tensors_in_its_interpreter_only():
    code = (
        "import torch, rlhf_fast.ops as ops; from rlhf_fast.ops import dispatch\n"
        "with ops.backend('triton'): print(dispatch.has_kernel('gae', torch.zeros(1)))"
    )
    assert python(code, TRITON_INTERPRET="1").stdout == "True\n"
    assert python(code).stdout == "False\n"


def test_unknown_backend():
    message = "backend: expected one of reference, cpu, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=message), rlhf_fast.ops.backend("gpu"):
        pass
    assert dispatch.override() is None


def test_an_override_belongs_to_its_thread():
    """64 overlapping blocks in 8 threads: each sees its own back end, and none is left behind."""
    start, wrong = threading.Barrier(8), []

    def work(n: int) -> None:
        start.wait()
        for i in range(8):
            name = ("reference", "cpu")[(n + i) % 2]
            with rlhf_fast.ops.backend(name):
                time.sleep(0.001 * (1 + (n * i) % 3))
                if dispatch.override() != name:
                    wrong.append((n, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    with rlhf_fast.ops.backend("cpu"):
        for thread in threads:
            thread.start()
        assert dispatch.override() == "cpu"
        for thread in threads:
            thread.join()
    assert not wrong and dispatch.override() is None and dispatch._traced is None and not dispatch._entered


def test_a_backward_pass_runs_where_its_forward_pass_did(monkeypatch):
    """In another thread, as autograd's for a GPU, and after the block."""
    x, ids, seen = torch.randn(2, 5, requires_grad=True), torch.tensor([1, 2]), []
    chosen = dispatch._chosen
    monkeypatch.setattr(dispatch, "_chosen", lambda *args: seen.append(dispatch.override()) or chosen(*args))
    for block in ("cpu", None):
        with rlhf_fast.ops.backend(block) if block else contextlib.nullcontext():
            loss = rlhf_fast.token_logprobs(x, ids).logprobs.sum()
        with rlhf_fast.ops.backend("reference"):
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        assert seen and set(seen) == {block}
        seen.clear()


def test_a_compiled_function_follows_the_override():
    x, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: rlhf_fast.gae(x, x, mask).advantages, fullgraph=True, backend=counter)
    eager = rlhf_fast.gae(x, x, mask).advantages
    for _ in range(2):
        assert torch.equal(compiled(x), eager)
        with rlhf_fast.ops.backend("reference"):
            torch.testing.assert_close(compiled(x), eager)
    assert counter.frame_count == 2 and counter.op_count > 2


def test_tensors_without_kernels_run_the_reference():
    """On a device with no kernels shapes, and here no values, come from the plain PyTorch body."""
    logits = torch.empty(4, 9, device="meta")
    out = rlhf_fast.ops.token_logprobs(logits, torch.empty(4, dtype=torch.int64, device="meta"))
    assert out.logprobs.shape == (4,) and out.entropy.device.type == "meta"
