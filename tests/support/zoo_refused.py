"""The decoder classes of transformers that cannot be trained: what their message says, and the settings of a config."""

from typing import Any

AHEAD = "depend on no later token"
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert that looks ahead": (AHEAD, {}),
    "blt": ("cuts the bytes of a whole row into patches", {}),
    "cpmant": (AHEAD, dict(dim_head=8, dim_ff=48, prompt_types=33, prompt_length=2)),
    # The class of the text model finds none of its weights in a checkpoint of the whole model.
    "emu3": (
        "all weights of Emu3ForCausalLM",
        dict(
            text_config=dict(vocab_size=61, num_hidden_layers=1, hidden_size=32, pad_token_id=0, intermediate_size=16)
        ),
    ),
    "gemma3n": ("needs the package timm", {}),
    "gemma4_assistant": (
        "continues the hidden states of another model",
        dict(
            text_config={"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        ),
    ),
    "gemma4_unified_assistant": ("continues the hidden states of another model", {}),
    "musicgen": ("predicts several audio codes a step", {}),
    "musicgen_melody": ("predicts several audio codes a step", {}),
    "prophetnet": (
        AHEAD,
        dict(
            is_decoder=True,
            num_hidden_layers=...,
            num_encoder_layers=1,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
        ),
    ),
    "reformer": ("sorts its keys by random numbers", {}),
    "xlm that looks ahead": (AHEAD, dict(emb_dim=32, n_layers=2, n_heads=4)),
    "xlnet": (AHEAD, dict(max_position_embeddings=..., d_inner=48, d_head=8)),
}
