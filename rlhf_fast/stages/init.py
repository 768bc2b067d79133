"""Starting from nothing: a byte-level BPE tokenizer trained on the data, and a model with random weights from a config.

`train_bpe` and `init_model` are the two steps; `init` does both from files, as the command line does.
Left out: loading published tokenizers and models. A stage takes their directory or name, and `transformers` loads them.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_fast.config import InitConfig
from rlhf_fast.data.encoding import pad_id
from rlhf_fast.data.messages import read_messages
from rlhf_fast.data.rows import check_unicode, read_rows
from rlhf_fast.training import checkpoint
from rlhf_fast.training.lock import writes_alone

_BYTES = 256


@writes_alone("output_dir")
def init(config: InitConfig) -> None:
    """Trains the tokenizer on the text columns, builds the model and writes both to output_dir.

    Raises ValueError where model_config is not JSON, and where a row lacks a text column.
    """
    path = Path(config.model_config)
    try:
        model_config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model_config: {path} is not JSON: {error}") from error
    tokenizer = train_bpe(_texts(config), config.vocab_size)
    init_model(model_config, tokenizer, config.output_dir, config.seed)


def _texts(config: InitConfig) -> Iterator[str]:
    for source in config.data:
        for n, (where, row) in enumerate(read_rows(source), 1):
            for column in config.text_columns:
                value = row.get(column)
                check_unicode(value, f"{where}: {column}")
                if isinstance(value, str):
                    yield value
                elif isinstance(value, list):
                    messages = read_messages(value, f"{where}: {column}")
                    yield from (message["content"] for message in messages if message.get("content") is not None)
                else:
                    got = "nothing" if value is None else type(value).__name__
                    raise ValueError(f"{where}: {column}: expected a string or a list of messages, got {got}")
            if n == config.max_rows:
                break


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    eos_token: str = "<eos>",
    pad_token: str | None = "<pad>",
    bos_token: str | None = None,
    extra_special_tokens: Iterable[str] = (),
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2): any text round-trips, nothing is unknown.

    The special tokens take the first ids, pad before the others; then come the 256 bytes and the merges. With bos_token
    the tokenizer puts BOS in front of every text. The vocabulary is smaller than vocab_size where the texts hold too
    few pairs. Raises ValueError if vocab_size has no room for the bytes and the special tokens.
    """
    special = [token for token in (pad_token, eos_token, bos_token, *extra_special_tokens) if token is not None]
    least = _BYTES + len(special)
    if vocab_size < least:
        raise ValueError(f"vocab_size: expected at least {least} (bytes and special tokens), got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bos_token is not None:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, bpe.token_to_id(bos_token))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos_token,
        pad_token=pad_token,
        bos_token=bos_token,
        additional_special_tokens=list(extra_special_tokens),
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,  # True would take the space out of "a ." when decoding
        padding_side="left",
    )


def init_model(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, output_dir: str | os.PathLike[str], seed: int
) -> PreTrainedModel:
    """Builds a causal LM with random weights from a transformers config and saves it with its tokenizer.

    config: `model_type` and the model's own keys, such as `{"model_type": "llama", "hidden_size": 128}`. The vocabulary
        size and the ids of EOS, pad and BOS come from the tokenizer.
    The directory appears complete or not at all. Raises ValueError for an unknown model_type, and for an unknown key,
    because transformers would keep the default and say nothing.
    """
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError("model_config: expected an object with model_type, such as llama or gpt2")
    keys = {key: value for key, value in config.items() if key != "model_type"}
    default = AutoConfig.for_model(config["model_type"])  # an unknown type is a ValueError that lists the types
    unknown = [key for key in keys if not hasattr(default, key)]
    if unknown:
        raise ValueError(f"model_config: {config['model_type']} has no {', '.join(unknown)}")
    keys |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_id(tokenizer),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys))
    checkpoint.save(output_dir, models={"": model}, tokenizer=tokenizer, state=None, extra_files={})
    return model
