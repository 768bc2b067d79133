"""The routes of a vLLM server that the package uses, over our own decoding of a small model, in a thread; and faults.

with FakeVLLM(path) as server:
    server.faults.append(("/v1/completions", "busy"))  # the next request of this route
    VLLMSampler(Server(Client(server.url, timeout=5, patience=5), ...), ...)
"""

import base64
import copy
import json
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.lm.adapters import put_on
from rlhf_fast.rollout.generate import generate


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that wait; the client opens up to 128 at once

    def handle_error(self, *_: Any) -> None:
        pass  # a client that does not wait for its answer


class FakeGroup:
    """What stands for an NCCL group: a queue to the server's thread."""

    sent_tensors: queue.Queue = queue.Queue()

    def __init__(self, unique: bytes, size: int, device: torch.device) -> None:
        assert unique == self.unique_id() and size == 2

    @staticmethod
    def unique_id() -> bytes:
        return bytes(range(128))

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.sent_tensors.put(tensor.clone())

    def sent(self) -> bool:
        return self.sent_tensors.unfinished_tasks == 0


class FakeVLLM:
    """A server of the model in directory `path`, whose tokens are those of our own decoding.

    faults: (route, kind), taken by the next request of the route: busy (503), broken (500), dropped (the connection
        closes), short (it closes within the answer), slow (the answer takes `nap` seconds), cut (a row loses its last
        token), lost (a row is missing), other (the log-probs are of other tokens), nan, restarted (the server forgets
        the weights that it got).
    lora: it takes adapters, which keep the names that they are loaded under.
    deaf: reloads weights without taking them: "all", "half" of them, or those whose name it is. load_format: "dummy":
        it starts with random weights and a head of its own, and loads no files before it is told to. mode, dtype, most:
        what the server says of itself. shift: added to every log-prob of a completion.
    """

    def __init__(self, path: str, **settings: Any) -> None:
        self.first = AutoModelForCausalLM.from_pretrained(path).eval()
        self.model, self.version = copy.deepcopy(self.first), "default"
        self.faults: list[tuple[str, str]] = []
        self.asked: list[tuple[str, Any]] = []
        self.deaf, self.mode, self.dtype, self.most = "", "processed_logprobs", "torch.float32", 64
        self.shift, self.nap, self.load_format, self.lora = 0.0, 0.5, "auto", False
        self.joined = b""  # the id of the group that weights come by
        self.adapters: dict[str, Any] = {}  # name -> the base with this adapter on it
        self.__dict__.update(settings)
        self.reads = self.load_format  # which is forgotten when it is started again
        if self.load_format == "dummy":
            untied = AutoConfig.from_pretrained(path, tie_word_embeddings=False)
            self.first = AutoModelForCausalLM.from_config(untied).eval()
            self.model = copy.deepcopy(self.first)
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self, None)

            def do_POST(self) -> None:
                outer.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        self._http = _Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "FakeVLLM":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def restart(self) -> None:
        """The server as it was started: it forgets the weights that it got."""
        self.model, self.version = copy.deepcopy(self.first), "default"
        self.reads, self.adapters, self.joined = self.load_format, {}, b""

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        route = handler.path.partition("?")[0]
        with self._lock:
            self.asked.append((route, body))
            fault = next((fault for fault in self.faults if fault[0] == route), None)
            if fault is not None:
                self.faults.remove(fault)
            kind = fault[1] if fault else ""
            if kind == "restarted":
                self.restart()
            status, found = {"busy": (503, {}), "broken": (500, {"error": {"message": "out of memory"}})}.get(
                kind, (200, None)
            )
            if found is None:
                status, found = self.of(route, body)
        if kind == "slow":
            time.sleep(self.nap)
        if kind == "dropped":
            handler.close_connection = True
            handler.connection.close()
            return
        if status == 200 and route == "/v1/completions":
            _spoil(found["choices"], kind)
        data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if kind == "short" else data)
        handler.close_connection = kind == "short"

    def of(self, route: str, body: Any) -> tuple[int, Any]:
        if route == "/v1/models":
            ids = ["tiny", *self.adapters]
            return 200, {"data": [{"id": name, "max_model_len": self.most} for name in ids]}
        if route == "/server_info":
            model = {"logprobs_mode": self.mode, "dtype": self.dtype}
            more = {"lora_config": {"max_lora_rank": 16}} if self.lora else {}
            return 200, {
                "vllm_config": {"model_config": model, "load_config": {"load_format": self.load_format}, **more}
            }
        if route == "/weight_info":
            return 200, {"weight_version": self.version}
        if route == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True}
        if route == "/reset_prefix_cache":
            return 200, {"success": True}
        if route == "/collective_rpc" and body["method"] == "update_config":
            self.reads = body["kwargs"]["overrides"]["load_config"]["load_format"]
            return 200, {"results": [None]}
        if route == "/collective_rpc":
            return self.reload(Path(body["kwargs"]["weights_path"]))
        if route == "/get_world_size":
            return 200, {"world_size": 1}
        if route == "/init_weight_transfer_engine":
            self.joined = base64.b64decode(body["init_info"]["nccl_unique_id_b64"])
            return 200, {"message": "Weight transfer initialized"}
        if route == "/start_weight_update":
            return (200, {}) if self.joined else (500, {"error": {"message": "Weight transfer not initialized"}})
        if route == "/update_weights":
            return self.receive(**body["update_info"])
        if route == "/finish_weight_update":
            self.version = body["weight_version"]
            return 200, {}
        if route == "/v1/load_lora_adapter" and self.lora:
            return self.load_adapter(body["lora_name"], body["lora_path"])
        if route == "/v1/unload_lora_adapter" and self.lora:
            gone = self.adapters.pop(body["lora_name"], None) is None
            return (404, {"error": {"message": "The lora adapter cannot be found."}}) if gone else (200, "Success")
        if route == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def reload(self, place: Path) -> tuple[int, Any]:
        weights = {name: x for file in place.glob("*.safetensors") for name, x in load_file(file).items()}
        if self.reads == "dummy":
            return 500, {"error": {"message": "Model reloading with `dummy` format"}}
        if not weights:
            return 500, {"error": {"message": f"no weights in {place}"}}
        names = [] if self.deaf == "all" else sorted(weights)[:: 2 if self.deaf == "half" else 1]
        names = [name for name in names if name != self.deaf]
        self.model.load_state_dict({name: weights[name] for name in names}, strict=False)
        return 200, {"results": [None]}

    def receive(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> tuple[int, Any]:
        known = dict(self.model.named_parameters())
        if names != [*known]:
            return 400, {"error": {"message": "no module or parameter of such a name"}}
        with torch.no_grad():
            for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
                found = FakeGroup.sent_tensors.get(timeout=10)
                assert str(found.dtype) == f"torch.{dtype}" and list(found.shape) == shape
                known[name].copy_(found)
                FakeGroup.sent_tensors.task_done()
        return 200, {}

    def load_adapter(self, name: str, place: str) -> tuple[int, Any]:
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        model = copy.deepcopy(self.model)
        if self.deaf != "all":
            put_on(model, place, None, trainable=False)
        self.adapters[name] = model
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def complete(self, body: Any) -> tuple[int, Any]:
        prompt, model = body["prompt"], {"tiny": self.model, **self.adapters}.get(body["model"])
        if model is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        size = self.model.config.vocab_size
        if max(prompt) >= size:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        if len(prompt) + body["max_tokens"] > self.most:
            return 400, {"error": {"message": "too many tokens"}}
        ids = torch.tensor([prompt])
        greedy, n = body.get("temperature", 1.0) == 0, body.get("n", 1)
        found = generate(
            model,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            max_new_tokens=body["max_tokens"],
            eos_ids=body.get("stop_token_ids") or [-1],
            pad_id=0,
            temperature=1.0 if greedy else body.get("temperature", 1.0),
            samples=0 if greedy else n,
            greedy=greedy,
            seed=body.get("seed", 0),
        )
        rollout = found.greedy if greedy else found.sampled
        assert rollout is not None
        choices = [self.choice(i, rollout, prompt) for i in range(len(rollout.finished))]
        if "prompt_logprobs" in body:
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            places = [{str(t): {"logprob": float(logprobs[i, t])}} for i, t in enumerate(prompt[1:])]
            choices[0]["prompt_logprobs"] = [None, *places]
        return 200, {"choices": choices[::-1]}  # vLLM promises no order

    def choice(self, i: int, rollout: Any, prompt: list[int]) -> dict[str, Any]:
        mask = rollout.response_mask[i]
        tokens = rollout.response_ids[i][mask].tolist()
        logprobs = [x + self.shift for x in rollout.logprobs[i][mask].tolist()]
        return {
            "index": i,
            "token_ids": tokens,
            "prompt_token_ids": prompt,
            "finish_reason": "stop" if rollout.finished[i] else "length",
            "logprobs": {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs},
        }


def _spoil(choices: list[dict[str, Any]], kind: str) -> None:
    if kind == "cut":
        choices[0]["token_ids"].pop()
        for values in choices[0]["logprobs"].values():
            values.pop()
    elif kind == "lost":
        choices.pop()
    elif kind == "other":
        choices[0]["logprobs"]["tokens"][0] = "token_id:9999"
    elif kind == "nan":
        choices[0]["logprobs"]["token_logprobs"][0] = None
