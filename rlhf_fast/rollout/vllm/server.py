"""A vLLM server as a run uses it: it is checked, it gets the policy's weights, and it proves that it samples from them.

Weights go by files. They are written to a hidden directory beside the run's output, which the server must be able to
read, and deleted when the server has loaded them. A push is believed after two proofs:

- numbers: the server's log-probs of a probe text are ours. Where a push changes our log-probs by more than rounding,
  the server's have to move with them; weights that are stale, or loaded by half, do not. In fp32 they also have to
  stay as near as after the first push, because a part that stays behind drifts by a little at each update.
- a name: the server keeps the name of the weights that a push has given. A server that was started again, or that got
  another run's weights, has another name, so that rows that it sampled in between are found.

Left out: weight transfer by NCCL.
"""

import json
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.data.files import WRITING, remove
from rlhf_fast.lm.adapters import merged
from rlhf_fast.lm.loading import save_model
from rlhf_fast.lm.passes import response_logits
from rlhf_fast.lm.quiet import without_bars
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.ranks import current
from rlhf_fast.rollout.vllm.client import BadAnswer, Client, ServerError
from rlhf_fast.rollout.vllm.rows import Request, text_logprobs

_PROBE = 64  # tokens of the probe text at most
_SHORTEST = 8
_ROUNDING = 1e-5  # nats a token that two right paths differ by in fp32
_FP32_BOUND = 0.005  # nats a token, on average, that they may differ by
_FP32_GROWTH, _FP32_FLOOR = 10.0, 1e-4  # the same after an update: so many times the first push's, or so many nats
MODE = "processed_logprobs"
UNLOADED = "dummy"  # --load-format of a server that waits for its first weights


class Restarted(ServerError):
    """The server no longer has the weights that it was given."""


class Server:
    """The server at `client.url` and the weights that it has.

    directory: where weights are written for the server; None: it keeps the weights that it was started with, which
        have to be the model's.
    bound: nats a token by which the server's log-probs of the probe may differ from ours on average, in bf16.
    """

    def __init__(self, client: Client, *, directory: Path | None, bound: float) -> None:
        self.client, self.directory, self.bound = client, directory, bound
        self.name = ""  # of the model, in requests
        self._run, self._pushes = uuid.uuid4().hex[:8], 0
        self._version = ""  # the name of the weights that the server has to have
        self._stale, self._checked = True, False
        self._probe: list[int] = []
        self._proven: Tensor | None = None  # our log-probs of the probe at the last push that a change has proven
        self._noise = _ROUNDING  # nats a token by which the two engines differ at the same weights
        self._exact, self._first = False, 0.0  # both in fp32; nats a token by which they differed after the first push
        self._unloaded = False  # the server was started without weights, and with a head of its own

    def changed(self) -> None:
        """The policy's weights have changed."""
        self._stale = True

    def check(self, model: PreTrainedModel, prompts: list[list[int]], longest: int, tokens: int) -> None:
        """Looks once, in every process, whether the server fits the model.

        prompts: token ids; the probe is made of them. longest: tokens of a prompt and its completion at most. tokens:
        of the tokenizer. Raises ServerError, naming what to do.
        """
        if self._checked:
            return
        served = self.client.get("/v1/models")["data"][0]
        self.name, most = served["id"], served.get("max_model_len")
        if most is not None and most < longest:
            raise ServerError(
                f"vllm_url: expected a server that takes {longest} tokens, prompt and completion, got --max-model-len "
                f"{most}"
            )
        text = [token for prompt in prompts[:_PROBE] for token in prompt]
        text *= -(-_SHORTEST // len(text))
        self._probe = text[: min(_PROBE, (most or longest) - 1)]
        self._check_config(model)
        self._check_vocabulary(max(tokens, model.config.get_text_config().vocab_size))
        self._checked = True

    def _check_config(self, model: PreTrainedModel) -> None:
        try:
            info = self.client.get("/server_info?config_format=json")["vllm_config"]
            config = info["model_config"]
            mode, dtype = config["logprobs_mode"], str(config["dtype"])
            load_format = info.get("load_config", {}).get("load_format")
        except (ServerError, KeyError, TypeError) as error:
            if isinstance(error, ServerError) and " 404 " not in str(error):
                raise
            raise ServerError(
                f"vllm_url: expected vLLM 0.32 with VLLM_SERVER_DEV_MODE=1 in its environment at {self.client.url}, "
                "found no /server_info there; `rlhf-fast vllm-command` prints how to start it"
            ) from error
        if mode != MODE:
            raise ServerError(f"vllm_url: expected a server with --logprobs-mode {MODE}, got {mode}")
        self._unloaded = load_format == UNLOADED
        if self._unloaded and self.directory is None:
            raise ServerError(
                f"vllm_url: expected a server with the model's weights, got --load-format {UNLOADED}, which waits for "
                "weights, and `pairs` pushes none; `rlhf-fast vllm-command --config` with the config of `pairs` prints "
                "how to start it"
            )
        if dtype.endswith("float32") and model.dtype == torch.float32:
            self.bound, self._exact = min(self.bound, _FP32_BOUND), True

    def _check_vocabulary(self, size: int) -> None:
        for token, fits in ((size - 1, True), (size, False)):
            try:
                self.client.post("/v1/completions", {"model": self.name, "prompt": [token], "max_tokens": 1})
                taken = True
            except ServerError as error:
                if "vocabulary" not in str(error):
                    raise
                taken = False
            if taken != fits:
                raise ServerError(
                    f"vllm_url: expected a server of a model with {size} tokens, as the policy has, got a "
                    f"{'larger' if taken else 'smaller'} vocabulary"
                )

    def refresh(self, model: PreTrainedModel) -> None:
        """Gives the server the weights of `model` where they have changed. Every process calls it, the first pushes.

        Raises ServerError where the server does not load them, or does not sample from them.
        """
        if not self._stale:
            return
        if current().first:
            self._version = self._push(model) if self.directory is not None else self._weights()
            self._prove(model)
        self._version, self._stale = current().gather(self._version)[0], False

    def confirm(self) -> None:
        """Restarted where the server has other weights than those of the last `refresh`."""
        if (found := self._weights()) != self._version:
            self._stale = True
            raise Restarted(
                f"vllm_url: expected the weights {self._version!r} at {self.client.url}, got {found!r}: the server was "
                "started again, or another run uses it"
            )

    def _weights(self) -> str:
        return str(self.client.get("/weight_info")["weight_version"])

    def _push(self, model: PreTrainedModel) -> str:
        assert self.directory is not None  # `refresh` asks first
        place = Path(self.directory).resolve() / f"{WRITING}vllm"
        version = f"{self._run}-{self._pushes + 1}"
        remove(place)
        try:
            place.mkdir(parents=True)
            with without_bars():
                save_model(merged(model), place)
            if self._unloaded:
                _write_head(model, place)
                read = {"overrides": {"load_config": {"load_format": "auto"}}}
                self.client.post("/collective_rpc", {"method": "update_config", "kwargs": read}, permanent={500})
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
            self.client.post("/collective_rpc", body, permanent={500})
            self.client.ask("POST", "/reset_prefix_cache", {}, _is_reset)
            self.client.post("/update_weight_version", {"new_version": version})
        except ServerError as error:
            raise ServerError(
                f"{error}; the server did not take the policy's weights from {place}, which it has to be able to read, "
                "and whose shapes have to be those of its model"
            ) from error
        finally:
            remove(place)
        self._pushes += 1
        return version

    @torch.no_grad()
    def _prove(self, model: PreTrainedModel) -> None:
        """ServerError unless the server's numbers for the probe are those of `model`."""
        logits_TV = _logits(model, self._probe)
        ids = torch.tensor(self._probe[1:])
        ours = logits_TV[:-1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        request = Request(self._probe, 1, 0.0, 1, 0)
        body = request.body(self.name, ()) | {"prompt_logprobs": 0}
        theirs, (row,) = self.client.ask(
            "POST", "/v1/completions", body, lambda a: (text_logprobs(a, self._probe), request.rows(a, ()))
        )
        drift = float((torch.tensor(theirs, dtype=torch.float64) - ours).abs().mean())
        moved = 0.0 if self._proven is None else float((ours - self._proven).abs().mean())
        told = moved > 12 * self._noise  # far enough that old and new weights cannot be mistaken for each other
        which = "those that it was started with" if self.directory is None else f"version {self._version}"
        if not drift <= self.bound:
            advice = "; start it with the policy's model" if self.directory is None else ""
            raise ServerError(
                f"vllm_url: expected the policy's weights at {self.client.url} ({which}), but its log-probs of a probe "
                f"differ by {drift:.3g} nats a token, more than {self.bound:g}{advice}"
            )
        if told and drift > moved / 4:
            raise ServerError(
                f"vllm_url: expected the policy's new weights at {self.client.url} ({which}), but its log-probs of a "
                f"probe differ by {drift:.3g} nats a token where the update moved them by {moved:.3g}: they are stale, "
                "or loaded by half"
            )
        far = max(_FP32_FLOOR, _FP32_GROWTH * self._first)
        if self._exact and self._pushes > 1 and self._first and drift > far:
            raise ServerError(
                f"vllm_url: expected the policy's new weights at {self.client.url} ({which}), but its log-probs of a "
                f"probe differ by {drift:.3g} nats a token where the first weights' differed by {self._first:.3g}: a "
                "part of the weights is stale; `rlhf-fast vllm-command` prints how to start a server that loads all"
            )
        best = logits_TV[-1].max() - logits_TV[-1, row.ids[0]]
        if best > max(4 * self.bound, 1e-3):
            raise ServerError(
                f"vllm_url: expected the likeliest token at temperature 0 from {self.client.url}, got a token "
                f"{float(best):.3g} nats below it; start the server with --generation-config vllm"
            )
        if self._proven is None or told:
            self._proven = ours
        self._noise = max(self._noise, drift)
        self._first = self._first or drift


def _write_head(model: PreTrainedModel, place: Path) -> None:
    """Adds the head of a model whose head is its embedding, for a server that keeps the two apart."""
    head: Any = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    save_file({f"{name}.weight": head.weight.detach().cpu().contiguous()}, place / "head.safetensors")
    index = place / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"][f"{name}.weight"] = "head.safetensors"
        index.write_text(json.dumps(content))


def _is_reset(answer: dict) -> None:
    if answer is not None and answer.get("success") is False:  # another client's requests are running
        raise BadAnswer("the prefix cache is in use")


def _logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The logits behind every token of `ids`, [len(ids), V] float64 on the CPU."""
    row = torch.tensor([ids], device=model.device)
    extra = torch.zeros_like(row[:, :1])  # a pass reads the logits that predict a response
    mask = torch.ones_like(row, dtype=torch.bool)
    sequences = Sequences(row[:, :1], mask[:, :1], torch.cat([row[:, 1:], extra], dim=1), mask)
    training = model.training
    model.eval()
    try:
        return response_logits(model, sequences)[0].double().cpu()
    finally:
        model.train(training)
