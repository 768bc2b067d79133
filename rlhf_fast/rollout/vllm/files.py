"""Weights that go to a server by files, which the server has to be able to read.

The whole model goes by `/collective_rpc reload_weights`. Of a policy with LoRA the adapter alone goes, by
`/v1/load_lora_adapter`, where the server was started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING. The
adapter's name is that of its version. Requests ask for this name, so that no server answers from another adapter. Any
other server gets the adapter merged into its base. A model in shards is saved as `saving` says.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.data.files import OURS, WRITING, remove
from rlhf_fast.lm.adapters import is_adapter, merged
from rlhf_fast.lm.private import has_adapter
from rlhf_fast.lm.quiet import without_bars
from rlhf_fast.lm.saving import save_model
from rlhf_fast.lm.sharding import full, is_saved_from_parts, is_sharded
from rlhf_fast.ranks import Ranks, current
from rlhf_fast.rollout.vllm.client import BadAnswer, Client, ServerError


class Files:
    """The files in `directory`, the run's.

    keeps: the files of the last push stay until the next push, for `reload`.
    """

    def __init__(self, client: Client, directory: Path, *, keeps: bool) -> None:
        self.client, self.directory, self.keeps = client, directory, keeps
        self.name = ""  # of the model that the server was started with
        self.unloaded = False  # whether the server was started without weights, and with a head of its own
        self.takes_adapters = False
        self._adapter, self._merges = "", False  # the adapter that the server has; whether it gets the whole model

    @property
    def kept(self) -> Path:
        """Where the files of the last push stay, for a server that is started again while the model moves on."""
        return self.directory.resolve() / f"{OURS}pushed"

    def push(self, model: PreTrainedModel, version: str) -> str:
        """Gives the server the weights of `model`; the name by which requests ask for them. All processes call it."""
        if not (current().first or is_saved_from_parts(model)):
            return ""
        place = self.directory.resolve() / f"{WRITING}vllm"
        if has_adapter(model) and not self._merges:
            try:
                return self._push(model, place, version, alone=True)
            except ServerError as error:
                if self.takes_adapters and error.status is None:  # the server is gone
                    raise
                reason = str(error) if self.takes_adapters else "it was started without --enable-lora"
                if is_sharded(model):
                    raise ServerError(
                        "shard: expected a server that takes an adapter alone, because the adapter's base is in "
                        f"shards; {reason}"
                    ) from error
                warnings.warn(f"vllm_url: the server gets the adapter merged into its base: {reason}", stacklevel=2)
                self._merges = True
        return self._push(model, place, version, alone=False)

    def reload(self, version: str) -> str:
        """Gives a server that was started again the kept weights; the name by which requests ask for them."""
        return self._load(self.kept, version)

    def restarted(self) -> None:
        """The server has lost what it had."""
        self._adapter = ""

    def forget(self) -> None:
        """Deletes the kept files."""
        if current().first:
            remove(self.kept)

    def _push(self, model: PreTrainedModel, place: Path, version: str, *, alone: bool) -> str:
        """alone: the adapter without its base."""
        if alone and not self.takes_adapters:
            raise ServerError("vllm_url: expected a server with --enable-lora")
        ranks = current() if is_saved_from_parts(model) else Ranks()

        def clear() -> None:
            remove(place)
            place.mkdir(parents=True)

        def give() -> str:
            if head is not None:
                _write_head(*head, place)
            name = self._load(place, version)
            if self.keeps:
                remove(self.kept)
                os.replace(place, self.kept)
            return name

        try:
            ranks.first_does(clear)
            with without_bars():
                save_model(model if alone else merged(model), place)
            head = _head(model) if self.unloaded and not alone else None
            return ranks.first_does(give)
        finally:
            if ranks.first:
                remove(place)

    def _load(self, place: Path, version: str) -> str:
        """The server reads its weights from the directory `place`, forgets what it has cached, and keeps the name."""
        try:
            if is_adapter(place):
                return self._load_adapter(place, version)
            if self.unloaded:
                read = {"overrides": {"load_config": {"load_format": "auto"}}}
                self.client.post("/collective_rpc", {"method": "update_config", "kwargs": read}, permanent={500})
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
            self.client.post("/collective_rpc", body, permanent={500})
            self.client.ask("POST", "/reset_prefix_cache", {}, is_reset)
            self.client.post("/update_weight_version", {"new_version": version})
            return self.name
        except ServerError as error:
            raise ServerError(
                f"{error}; the server did not take the policy's weights from {place}, which it has to be able to read, "
                "and whose shapes have to be those of its model",
                status=error.status,
            ) from error

    def _load_adapter(self, place: Path, version: str) -> str:
        """A new name has no cached keys and values of another adapter, so that no cache has to be reset."""
        body = {"lora_name": version, "lora_path": str(place)}
        try:
            self.client.post("/v1/load_lora_adapter", body, permanent={500}, plain=True)
        except ServerError as error:
            if "already been loaded" not in str(error):  # by a try whose answer was lost
                raise
        before, self._adapter = self._adapter, version
        if before:
            self._unload(before)
        return version

    def _unload(self, name: str) -> None:
        try:
            self.client.post("/v1/unload_lora_adapter", {"lora_name": name}, plain=True)
        except ServerError as error:
            if error.status != 404:  # a server that was started again does not have it
                raise


def _head(model: PreTrainedModel) -> tuple[str, Tensor]:
    """The name and the whole weight of the head. All processes call it where the model is in shards."""
    head: Any = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    return f"{name}.weight", full(head.weight.detach())


def _write_head(name: str, weight: Tensor, place: Path) -> None:
    """Adds the head of a model whose head is its embedding, for a server that keeps the two apart."""
    save_file({name: weight.cpu().contiguous()}, place / "head.safetensors")
    index = place / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"][name] = "head.safetensors"
        index.write_text(json.dumps(content))


def is_reset(answer: Any) -> None:
    """BadAnswer where the prefix cache could not be reset."""
    if answer is not None and answer.get("success") is False:  # another client's requests are running
        raise BadAnswer("the prefix cache is in use")
