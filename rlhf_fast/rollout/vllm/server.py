"""A vLLM server as a run uses it: it is checked, it gets the policy's weights, and it proves that it samples from them.

`files` and `nccl` have the ways by which weights go. A push is believed after two proofs:

- numbers: the server's log-probs of a probe text are ours. Where a push changes our log-probs by more than rounding,
  the server's have to move with them; weights that are stale, or loaded by half, do not. In fp32 they also have to
  stay as near as after the first push, because a part that stays behind drifts by a little at each update.
- a name: the server keeps the name of the weights that a push has given. A server that was started again, or that got
  another run's weights, has another name, so that rows that it sampled in between are found.

A run that samples a round ahead keeps the files of its last push, because its own weights move on while the server
samples: a server that is started again gets them from there.
"""

import uuid
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import write_json
from rlhf_fast.lm.passes import response_logits
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.sharding import whole
from rlhf_fast.ranks import current
from rlhf_fast.rollout.vllm.client import Client, ServerError
from rlhf_fast.rollout.vllm.files import Files
from rlhf_fast.rollout.vllm.nccl import Nccl
from rlhf_fast.rollout.vllm.rows import Request, text_logprobs

_PROBE = 64  # tokens of the probe text at most
_SHORTEST = 8
_ROUNDING = 1e-5  # nats a token that two right paths differ by in fp32
_FP32_BOUND = 0.005  # nats a token, on average, that they may differ by
_NOTE = "proof.json"  # beside kept files: the round that is sampled from them, and their `Proof`
_FP32_GROWTH, _FP32_FLOOR = 10.0, 1e-4  # the same after an update: so many times the first push's, or so many nats
MODE = "processed_logprobs"
UNLOADED = "dummy"  # --load-format of a server that waits for its first weights


class Restarted(ServerError):
    """The server no longer has the weights that it was given."""


class Proof(NamedTuple):
    """What a server that has the policy's weights says of the probe."""

    logprobs: list[float]  # of every token but the first
    likeliest: list[int]  # the tokens behind it that are within rounding of the likeliest


class Server:
    """The server at `client.url` and the weights that it has.

    directory: where weights are written for the server; None: it keeps the weights that it was started with, which
        have to be the model's.
    bound: nats a token by which the server's log-probs of the probe may differ from ours on average, in bf16.
    keeps: as in `Files`. transfer: "files" or "nccl".
    """

    def __init__(
        self, client: Client, *, directory: Path | None, bound: float, keeps: bool = False, transfer: str = "files"
    ) -> None:
        self.client, self.bound = client, bound
        self.way: Files | Nccl | None = None
        if directory is not None:
            self.way = Nccl(client) if transfer == "nccl" else Files(client, directory, keeps=keeps)
        self.name = ""  # of the model, in requests
        self._run, self._pushes = uuid.uuid4().hex[:8], 0
        self._version = ""  # the name of the weights that the server has to have
        self._stale, self._checked = True, False
        self._probe: list[int] = []
        self._proof: Proof | None = None  # of the last push
        self._proven: Tensor | None = None  # our log-probs of the probe at the last push that a change has proven
        self._noise = _ROUNDING  # nats a token by which the two engines differ at the same weights
        self._exact, self._first = False, 0.0  # both in fp32; nats a token by which they differed after the first push

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
        if self.way is not None:
            self.way.name, self.way.unloaded = self.name, load_format == UNLOADED
            self.way.takes_adapters = info.get("lora_config") is not None
        elif load_format == UNLOADED:
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
        ranks = current()
        with whole(model):
            proof = self._numbers(model) if ranks.first else None
        version = self._next_version()
        if self.way is not None:
            self.name = self.way.push(model, version)
        if proof is not None:
            self._proof, self._version = proof, self._weights() if self.way is None else version
            self._prove(proof)
        self._version, self.name = ranks.gather((self._version, self.name))[0]
        self._stale = False

    def confirm(self) -> None:
        """Restarted where the server has other weights than those of the last `refresh`."""
        if (found := self._weights()) != self._version:
            self._stale = True
            if self.way is not None:
                self.way.restarted()
            raise Restarted(
                f"vllm_url: expected the weights {self._version!r} at {self.client.url}, got {found!r}: the server was "
                "started again, or another run uses it"
            )

    def note(self, step: int) -> None:
        """Notes beside the kept files that round `step` is sampled from them, for `restored`. The first process does.

        step: the number of a round, from 1 on.
        """
        if current().first and self._proof is not None and isinstance(self.way, Files):
            note = {"round": step, "probe": self._probe, **self._proof._asdict()}
            write_json(self.way.kept / _NOTE, note)

    def reload(self) -> None:
        """Gives a server that was started again the kept weights of the last `refresh`, while the model moves on."""
        assert self._proof is not None and self.way is not None  # a refresh comes before
        self.name = self.way.reload(self._version)
        self._prove(self._proof)  # the model itself may have moved on, so that it stays as stale as it is

    def restored(self, step: int) -> bool:
        """Whether the kept files of an earlier run are those of round `step`; the server then has them.

        The next `refresh` pushes the model's weights. All processes call it.
        """
        path = self.way.kept / _NOTE if isinstance(self.way, Files) else None
        note = read_json(path) if path is not None and path.is_file() else {}
        found = current().gather(note.get("round") == step)[0]
        if found and current().first:
            self._probe, self._proof = note["probe"], Proof(note["logprobs"], note["likeliest"])
            self._version = self._next_version()
            self.reload()
        self._version, self.name = current().gather((self._version, self.name))[0]
        self._stale = True
        return found

    def forget(self) -> None:
        """Deletes the kept files."""
        if self.way is not None:
            self.way.forget()

    def _weights(self) -> str:
        """The name of the weights that the server has; of an adapter, its own name where the server has it."""
        found = str(self.client.get("/weight_info")["weight_version"])
        if self.way is None or self.name == self.way.name:
            return found
        served = {model["id"] for model in self.client.get("/v1/models")["data"]}
        return self.name if self.name in served else f"{found}, without the adapter"

    def _next_version(self) -> str:
        self._pushes += 1
        return f"{self._run}-{self._pushes}"

    @torch.no_grad()
    def _numbers(self, model: PreTrainedModel) -> Proof:
        """What `model` says of the probe."""
        logits_TV = _logits(model, self._probe)
        ids = torch.tensor(self._probe[1:])
        logprobs = logits_TV[:-1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        near = logits_TV[-1] >= logits_TV[-1].max() - max(4 * self.bound, 1e-3)
        return Proof(logprobs.tolist(), near.nonzero()[:, 0].tolist())

    def _prove(self, proof: Proof) -> None:
        """ServerError unless the server's numbers for the probe are those of `proof`."""
        ours = torch.tensor(proof.logprobs, dtype=torch.float64)
        request = Request(self._probe, 1, 0.0, 1, 0)
        body = request.body(self.name, ()) | {"prompt_logprobs": 0}
        theirs, (row,) = self.client.ask(
            "POST", "/v1/completions", body, lambda a: (text_logprobs(a, self._probe), request.rows(a, ()))
        )
        drift = float((torch.tensor(theirs, dtype=torch.float64) - ours).abs().mean())
        moved = 0.0 if self._proven is None else float((ours - self._proven).abs().mean())
        told = moved > 12 * self._noise  # far enough that old and new weights cannot be mistaken for each other
        which = "those that it was started with" if self.way is None else f"version {self._version}"
        if not drift <= self.bound:
            advice = "; start it with the policy's model" if self.way is None else ""
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
        if row.ids[0] not in proof.likeliest:
            raise ServerError(
                f"vllm_url: expected the likeliest token at temperature 0 from {self.client.url}, got another token; "
                "start the server with --generation-config vllm"
            )
        if self._proven is None or told:
            self._proven = ours
        self._noise = max(self._noise, drift)
        self._first = self._first or drift


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
