"""Configs of small models and of two published ones, as files."""

import json
from pathlib import Path

import pytest

SHAPES = {
    "small": {  # 1 million weights
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 1000,
    },
    "grouped": {  # 5 million, grouped queries
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2000,
    },
    "gpt2": {  # 10 million, tied embeddings, wide vocabulary
        "model_type": "gpt2", "n_embd": 320, "n_layer": 6, "n_head": 8, "n_positions": 128, "vocab_size": 8000,
        "bos_token_id": 1, "eos_token_id": 1,
    },
    "gemma2": {  # layers of two kinds in turn
        "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32, "vocab_size": 500,
    },
    "wide": {  # 1 million, nearly all of it vocabulary, which is no multiple of 8
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "vocab_size": 20001,
    },
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    },
    "opt-1.3b": {
        "model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "vocab_size": 50272, "word_embed_proj_dim": 2048, "max_position_embeddings": 2048,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory: Path = tmp_path_factory.mktemp("shapes")
    files = {name: directory / f"{name}.json" for name in SHAPES}
    for name, file in files.items():
        file.write_text(json.dumps(SHAPES[name]))
    return {name: str(file) for name, file in files.items()}
