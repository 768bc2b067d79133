"""Models in shards over two processes: every loss gives one process's gradients, as it enters by the root."""

import torch

from rlhf_fast.training.memory import static_bytes
from rlhf_fast.training.tensor_bytes import TensorBytes
from tests.support.ranks import launch


def test_gradients_of_two_processes_are_those_of_one():
    first, second = launch(2, "-m", "tests.support.sharded")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    worst = dict(line.rsplit(": ", 1) for line in first.stdout.splitlines() if ": " in line)
    assert worst.keys() == {
        *("sft", "sft, tied", "sft, checkpointed", "sft, GPT-2", "reinforce", "ppo", "ppo from logits", "dpo", "kto"),
        *("log-probs", "joint", "scores", "values", "sft, LongRoPE", "sft from logits, LongRoPE", "sft, rows alone"),
    }
    assert all(float(difference) < 2e-6 for difference in worst.values()), worst


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, (2 * len(inner), *inner.shape[1:]), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nothing computes with it here")


def test_bytes_of_a_wrapper_are_those_of_what_it_wraps():
    inner = torch.ones(4, 8)
    with TensorBytes(exclude=[Wrapper(inner)]) as counter:
        inner.sum()  # left out, as the wrapper's own memory is
        assert counter.peak == 4
    module = torch.nn.Module()
    module.register_buffer("weight", Wrapper(inner))
    assert static_bytes({"": module})[""]["weights"] == inner.nbytes
