"""Weights that go from GPU to GPU by NCCL: vLLM's own weight transfer, back end "nccl" (0.32), written by its source.

    GET  /get_world_size                  the number of the server's workers, n
    POST /init_weight_transfer_engine     {"init_info": {rank_offset: 1, world_size: n + 1, nccl_unique_id_b64, packed}}
    POST /start_weight_update
    POST /update_weights                  {"update_info": {names, dtype_names, shapes}}, answered when all has come
    POST /finish_weight_update            {"weight_version": ...}

The trainer is rank 0 of a group with all workers. It mints the group's id and sends it by HTTP, so that no vLLM has to
be installed beside the trainer. Right after the group is made every member adds up one number, as vLLM's workers do.
Every weight is one broadcast. The weights of a model in shards are gathered tensor by tensor.

Not run yet: the machines of this project have no two GPUs. The tests run the protocol with a group of their own.
"""

import base64
import ctypes
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.lm.sharding import full
from rlhf_fast.ranks import current
from rlhf_fast.rollout.vllm.client import Client, ServerError
from rlhf_fast.rollout.vllm.files import is_reset

_ID = 128  # bytes
_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
_SUM = 0


class Group(Protocol):
    """The trainer's end of a group with a server's workers, as rank 0."""

    def broadcast(self, tensor: Tensor) -> None:
        """Sends a tensor to the workers; it may return before they have it."""
        ...

    def sent(self) -> bool:
        """Whether the workers have everything."""
        ...


class Nccl:
    """The weights go by NCCL. No files are kept, so that a server that is started again ends a run that is ahead of it.

    group: makes (the group's id, and the end of it that joins), for tests.
    """

    def __init__(self, client: Client, group: Any = None) -> None:
        self.client, self.name = client, ""
        self.unloaded = self.takes_adapters = False  # as in `Files`; whole weights go in any case
        self._once = Client(client.url, timeout=client.timeout, patience=0)  # a broadcast is not made twice
        self._kind = group or NcclGroup
        self._group: Group | None = None

    def push(self, model: PreTrainedModel, version: str) -> str:
        """As in `Files`."""
        named = list(model.named_parameters())
        if not current().first:
            for _, parameter in named:
                full(parameter)
            return ""
        try:
            if self._group is None:
                self._group = self._join(model.device)
            self.client.post("/start_weight_update")
            update = {
                "names": [name for name, _ in named],
                "dtype_names": [str(p.dtype).removeprefix("torch.") for _, p in named],
                "shapes": [list(p.shape) for _, p in named],
            }
            self._beside("/update_weights", {"update_info": update}, (full(p.detach()) for _, p in named))
            self.client.post("/finish_weight_update", {"weight_version": version})
            self.client.ask("POST", "/reset_prefix_cache", {}, is_reset)
        except ServerError as error:
            self._group = None  # its other members may wait for what does not come
            advice = 'start it with --weight-transfer-config \'{"backend": "nccl"}\', or set vllm_transfer files'
            raise ServerError(f"{error}; the server did not take the policy's weights by NCCL; {advice}") from error
        return self.name

    def reload(self, version: str) -> str:
        """Raises ServerError: the weights of that version are gone."""
        raise ServerError(
            f"vllm_transfer: expected a server that keeps the weights {version!r}, but it was started again while the "
            "policy moved on, and NCCL keeps no files; --resume goes on"
        )

    def restarted(self) -> None:
        """As in `Files`: the next push makes a new group."""
        self._group = None

    def forget(self) -> None:
        """Nothing is kept."""

    def _join(self, device: torch.device) -> Group:
        workers = int(self.client.get("/get_world_size")["world_size"])
        unique = self._kind.unique_id()
        info = {
            "rank_offset": 1,
            "world_size": workers + 1,
            "nccl_unique_id_b64": base64.b64encode(unique).decode(),
            "packed": False,
        }
        with ThreadPoolExecutor(1) as pool:  # the workers answer when all members have joined
            joined = pool.submit(self._once.post, "/init_weight_transfer_engine", {"init_info": info})
            _raise_if_refused(joined)
            group = self._kind(unique, workers + 1, device)
            joined.result()
        return group

    def _beside(self, route: str, body: dict[str, Any], tensors: Iterator[Tensor]) -> None:
        """Sends the tensors while the server answers to `body`."""
        assert self._group is not None  # `push` has joined
        pool = ThreadPoolExecutor(1)
        try:
            taken = pool.submit(self._once.post, route, body)
            _raise_if_refused(taken)
            for tensor in tensors:
                self._group.broadcast(tensor.contiguous())
            while not self._group.sent():
                if taken.done():
                    taken.result()  # raises where the server does not take the rest
                time.sleep(0.001)
            taken.result()
        finally:
            pool.shutdown(wait=False)  # after an error the server may wait for what does not come


def _raise_if_refused(answer: Future, seconds: float = 0.2) -> None:
    """A server that refuses says so at once; a broadcast would then wait for ever."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not answer.done():
        time.sleep(0.01)
    if answer.done():
        answer.result()


class NcclGroup:
    """Rank 0 of an NCCL group by the library that torch has loaded."""

    def __init__(self, unique: bytes, size: int, device: torch.device) -> None:
        self._comm = ctypes.c_void_p()
        with torch.cuda.device(device):
            _check(_library().ncclCommInitRank(ctypes.byref(self._comm), size, _Id.from_buffer_copy(unique), 0))
            one = torch.zeros(1, device=device)
            pointer, stream = ctypes.c_void_p(one.data_ptr()), self._stream()
            _check(_library().ncclAllReduce(pointer, pointer, 1, _TYPES[one.dtype], _SUM, self._comm, stream))
            torch.cuda.current_stream().synchronize()
        self._event = torch.cuda.Event()

    @staticmethod
    def unique_id() -> bytes:
        """The id of a new group."""
        unique = _Id()
        _check(_library().ncclGetUniqueId(ctypes.byref(unique)))
        return bytes(unique)

    @staticmethod
    def _stream() -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def broadcast(self, tensor: Tensor) -> None:
        """As in `Group`."""
        pointer, kind = ctypes.c_void_p(tensor.data_ptr()), _TYPES[tensor.dtype]
        _check(_library().ncclBroadcast(pointer, pointer, tensor.numel(), kind, 0, self._comm, self._stream()))
        tensor.record_stream(torch.cuda.current_stream())
        self._event.record()

    def sent(self) -> bool:
        """As in `Group`."""
        return self._event.query()


class _Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * _ID)]


def _library() -> Any:
    """NCCL with the types of the arguments that are no plain integers."""
    library = ctypes.CDLL("libnccl.so.2")
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), number, _Id, number]
    library.ncclAllReduce.argtypes = [pointer, pointer, size, number, number, pointer, pointer]
    library.ncclBroadcast.argtypes = [pointer, pointer, size, number, number, pointer, pointer]
    return library


def _check(result: int) -> None:
    if result:
        raise ServerError(f"vllm_transfer: NCCL says {_library().ncclGetErrorString(result).decode()}")
