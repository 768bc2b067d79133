"""The processes of a run: which process this is, what share of the rows is its own, and sums over all processes.

A launcher such as `torchrun` starts every process with the variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Without them there is one process, and every function here returns what it was given.

    ranks = current()
    mine = ranks.share(rows)  # consecutive rows of the global batch
    total = ranks.sum(loss_of(mine))  # the same number in every process

Every process makes the same calls in the same order, because a call waits for the calls of the other processes. torch's
process groups are used in this module alone. A call raises ConnectionError where another process is gone
(`rlhf_fast.failing`).
"""

import atexit
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from rlhf_fast import failing
from rlhf_fast.presence import meet

Row = TypeVar("Row")

WAIT = timedelta(hours=2)  # a reward function or the writing of a model may keep one process busy for long
_BUCKET = 1 << 24  # numbers that are added up in one call
_SMALL = 2048  # bytes of a value, with its length, that `gather` exchanges in one call
_LENGTH = 8  # bytes
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """rank: the number of this process, from 0 on. size: the number of processes. local: its number on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    @property
    def beside(self) -> int:
        """The number of the run's processes on this machine, as the launcher says it."""
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size))))

    def part(self, rows: int, rank: int | None = None) -> slice:
        """The place of this process's rows among `rows` rows, or of the process `rank`.

        The processes' shares differ by at most one row.
        """
        rank = self.rank if rank is None else rank
        return slice(rows * rank // self.size, rows * (rank + 1) // self.size)

    def shares(self, rows: int) -> list[int]:
        """How many of `rows` rows each process has, in the order of the processes."""
        return [part.stop - part.start for part in (self.part(rows, rank) for rank in range(self.size))]

    def share(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This process's rows: consecutive ones, in the order of the processes."""
        return rows if self.size == 1 else rows[self.part(len(rows))]

    def earlier(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of the processes before this process."""
        return rows[: self.part(len(rows)).start]

    def gather(self, value: Row) -> list[Row]:
        """The values of all processes in their order. value: anything that pickle takes, such as tensors on the CPU.

        Values of up to 2 KiB take one collective, and larger values take two.
        """
        if self.size == 1:
            return [value]
        data = pickle.dumps(value)
        parts = self._gather_bytes(len(data).to_bytes(_LENGTH, "big") + data, _SMALL)
        lengths = [_LENGTH + int.from_bytes(part[:_LENGTH], "big") for part in parts]
        if max(lengths) > _SMALL:
            rest = self._gather_bytes(data[_SMALL - _LENGTH :], max(lengths) - _SMALL)
            parts = [first + more for first, more in zip(parts, rest, strict=True)]
        return [pickle.loads(part[_LENGTH:length]) for part, length in zip(parts, lengths, strict=True)]

    def _gather_bytes(self, mine: bytes, size: int) -> list[bytes]:
        """The first `size` bytes of all processes; a shorter value is filled up."""
        sent = torch.frombuffer(bytearray(mine[:size].ljust(size, b"\0")), dtype=torch.uint8)
        got = [torch.empty(size, dtype=torch.uint8) for _ in range(self.size)]
        with _together():
            dist.all_gather(got, sent)
        return [part.numpy().tobytes() for part in got]

    def join(self, parts: list[list[Row]]) -> list[Row]:
        """The rows of all processes in their order, part by part. parts: what this process made of every part's share.

        Of two processes with parts [[1], [4]] and [[2, 3], [5]] it makes [1, 2, 3, 4, 5].
        """
        return [row for part in zip(*self.gather(parts), strict=True) for share in part for row in share]

    def cat(self, x: Tensor) -> Tensor:
        """The tensors [rows, ...] of all processes as one tensor, on the device of `x`."""
        return x if self.size == 1 else torch.cat(self.gather(x.cpu())).to(x.device)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all processes, added in the order of the processes, so that all have its bits."""
        if self.size == 1:
            return x
        first, *others = self.gather(x.cpu())
        for other in others:
            first = first + other
        return first.to(x.device)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            self.gather(None)

    def same_error(self, error: Exception | None) -> None:
        """Raises the error of this process, or else the first error of another process. All processes call it."""
        if error is not None and self.size == 1:
            raise error
        found = self.gather(_sendable(error))
        if error is not None:
            raise error
        for other in found:
            if other is not None:
                raise other

    def first_does(self, act: Callable[[], Row]) -> Row:
        """What `act()` returns in the first process, in all processes. What it raises is raised in all of them."""
        done, error = None, None
        if self.first:
            try:
                done = act()
            except Exception as raised:
                error = raised
        self.same_error(error)
        return self.gather(done)[0]  # pyright: ignore[reportReturnType]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside, one process works at a time, in the order of the processes."""
        for _ in range(self.rank):
            self.wait()
        yield
        for _ in range(self.rank, self.size):
            self.wait()

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradients of the parameters by their sums over all processes.

        A parameter that has a gradient in one process alone, such as an expert that no other process's rows chose,
        gets it in all of them. Gradients in half precision are added in float32. A number for each parameter goes with
        the gradients: in how many processes it has one.
        """
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = _flat(bucket)
            *parts, there = flat.split([*(parameter.numel() for parameter in bucket), len(bucket)])
            for parameter, part in zip(bucket, parts, strict=True):
                if parameter.grad is None:
                    part.zero_()
                else:
                    part.copy_(parameter.grad.flatten())
            there.copy_(torch.tensor([parameter.grad is not None for parameter in bucket]))
            with _together():
                dist.all_reduce(flat)
            missing = [i for i, parameter in enumerate(bucket) if parameter.grad is None]
            elsewhere = there.tolist() if missing else []  # waits for a GPU only where a gradient is missing here
            for i in missing:
                if elsewhere[i]:
                    bucket[i].grad = torch.zeros_like(bucket[i])
            for parameter, part in zip(bucket, parts, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view_as(parameter))


def bytes_to_add(gradients: Iterable[Tensor]) -> int:
    """Bytes that `Ranks.add_gradients` takes beside these gradients, which may be on the meta device."""
    buckets = _buckets([gradient.to("meta") for gradient in gradients])
    return max((_flat(bucket).nbytes for bucket in buckets), default=0)


_current: Ranks | None = None


def current() -> Ranks:
    """The processes of this run. The first call joins the other processes where a launcher has started this process.

    Raises ValueError where the launcher's variables are not all there.
    """
    global _current
    if _current is None:
        _current = _join()
    return _current


def announced() -> tuple[int, int]:
    """The number of this process and of all processes as a launcher's variables say them; joins nobody."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _join() -> Ranks:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE: expected {', '.join(missing)} beside it in the environment; torchrun sets them")
    connect()
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    failing.watch(ranks.gather)
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local)
    if not ranks.first:
        warnings.simplefilter("ignore")  # the first process says the same
    return ranks


def connect() -> None:
    """Makes the process group of the processes that a launcher has started, also where there is one process alone."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with _together():
            store, rank, size = next(rendezvous("env://", timeout=WAIT))
            store = dist.PrefixStore(meet(store, rank, size), store)  # pyright: ignore[reportPrivateImportUsage]
            failing.ask(store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
        atexit.register(_leave)


@contextmanager
def pretended(size: int) -> Iterator[None]:
    """Inside, torch sees `size` processes, of which this process is the first. Nothing is sent: all numbers are wrong.

    For passes of the planner, whose tensors have no numbers. Raises ValueError where the process has joined others.
    """
    if dist.is_initialized():
        raise ValueError(f"gpus: expected a process that has not joined other processes yet, to plan for {size}")
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Inside, torch's errors about a process that is gone become ConnectionErrors of one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise failing.lost(error) from error


def _sendable(error: Exception | None) -> Exception | None:
    """The error as another process can raise it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception may hold anything
        return ConnectionError(f"another process of the run has failed: {error}")
    return error


def _leave() -> None:
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    failing.part()


def _flat(bucket: list[Any]) -> Tensor:
    """Room for the numbers of a bucket, in float32 at least, and for one number for each of its parameters."""
    dtype = torch.promote_types(bucket[0].dtype, torch.float32)
    return torch.empty(sum(p.numel() for p in bucket) + len(bucket), dtype=dtype, device=bucket[0].device)


def _buckets(parameters: Iterable[Any]) -> Iterator[list[Any]]:
    """The parameters in groups of one dtype and of about `_BUCKET` numbers, in their order."""
    bucket: list[Any] = []
    for parameter in parameters:
        if bucket and (bucket[0].dtype != parameter.dtype or sum(p.numel() for p in bucket) >= _BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
