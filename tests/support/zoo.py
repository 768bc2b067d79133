"""Every decoder class of transformers as a tiny model: the settings of its config, and nothing else.

`SIZES` holds the sizes by the names that families give them; a family gets those that its config has. `OWN` has the
settings beyond these, such as the types of layers; a member without any is in `PLAIN`. What makes a variant follows the
model type in its name, as in "llama yarn". The models that cannot be trained are in `zoo_refused`.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tests.support.zoo_refused import REFUSED

VERSION = "5.23.0"  # of transformers, whose classes are all here

# Rows cross windows and chunks of 10 and 8 tokens, original lengths of 24 and tables of 6 sparse keys.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "sliding_window": 10,
    "sliding_window_size": 10,
    # the decoder halves of encoder-decoder models
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "dense_intermediate_size": 48,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    # latent attention and its index of keys
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "o_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 16,  # with few heads many scores are 0, and which of these keys are taken is chance
    "index_head_dim": 16,
    "index_topk": 6,
    # recurrent layers
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "chunk_size": 8,
}
BOTH = dict(layer_types=["sliding_attention", "full_attention"])
LINEAR_FULL = dict(layer_types=["linear_attention", "full_attention"])
DENSE_SPARSE = dict(mlp_layer_types=["dense", "sparse"])
LATENT = dict(num_key_value_heads=4)  # latent attention has as many keys as queries
THETA = dict(rope_theta=10000.0)
LONGROPE = dict(
    THETA,
    rope_type="longrope",
    short_factor=[1.0] * 4,
    long_factor=[4.0] * 4,
    factor=8.0,
    original_max_position_embeddings=24,
    partial_rotary_factor=1.0,
)
YARN = dict(
    THETA,
    rope_type="yarn",
    factor=16.0,
    original_max_position_embeddings=12,
    llama_4_scaling_beta=0.4,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
LLAMA3 = dict(
    THETA,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=24,
)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
LLAMA4_VISION = dict(VISION, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4)
AUDIO = dict(
    hidden_size=16,
    intermediate_size=16,
    num_blocks=1,
    num_attention_heads=2,
    ext_pw_out_channel=16,
    depthwise_separable_out_channel=16,
    nemo_conv_channels=8,
    nemo_final_size=10,
)
DECODER = dict(is_decoder=True)  # else these models look ahead
GPT2 = dict(n_embd=32, n_layer=2, n_head=4)
GEMMA4 = dict(BOTH, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61, global_head_dim=8)
GEMMA3N = dict(
    GEMMA4,
    num_hidden_layers=4,
    intermediate_size=[48] * 4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    laurel_rank=4,
)
QWEN4 = dict(
    layer_types=["linear_attention", "indexed_attention"],
    hc_lowrank=4,
    ple_embed_dim=8,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=2,
)
INKLING = dict(
    layer_types=["hybrid_sliding", "hybrid"],
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    d_rel=4,
    rel_extent=16,
    logits_mup_width_multiplier=2.0,
)
DOTS3 = dict(
    LATENT,
    **DENSE_SPARSE,
    layer_types=["indexed_attention", "sliding_attention"],
    swa_num_attention_heads=4,
    swa_q_lora_rank=8,
    swa_kv_lora_rank=8,
    swa_num_key_value_heads=4,
    swa_head_dim=16,
    swa_qk_nope_head_dim=8,
    swa_v_head_dim=8,
)
PLAIN = [
    "apertus", "arcee", "aria_text", "bart", "bigbird_pegasus", "biogpt", "bitnet", "blenderbot", "blenderbot-small",
    "diffllama", "doge", "ernie4_5", "ernie4_5_moe", "falcon_mamba", "flex_olmo", "flint", "gemma", "glm", "glm4",
    "glm4_moe", "gpt-sw3", "gpt_neox", "gpt_neox_japanese", "granitemoe", "granitemoeshared", "helium", "hrm_text",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe",
    "kolibri1", "laguna", "llama", "mamba", "marian", "mbart", "minimax_m2", "mistral", "mixtral",
    "modernbert-decoder", "moshi", "mvp", "nanochat", "nemotron", "olmo", "olmo2", "olmoe", "openai-gpt", "pegasus",
    "persimmon", "phi", "plbart", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open",
    "stablelm", "trocr", "whisper",
]  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "afmoe": BOTH,
    "axk1": dict(LATENT, **DENSE_SPARSE),
    "axk2": dict(LATENT, **DENSE_SPARSE),
    "bailing_hybrid": dict(LATENT, **LINEAR_FULL, **DENSE_SPARSE),
    "bamba": dict(attn_layer_indices=[1]),
    "beam": dict(BOTH, **DENSE_SPARSE),
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER,
    "bloom": dict(n_layer=2, n_head=4),
    "camembert": DECODER,
    "codegen": dict(GPT2, rotary_dim=4),
    "cohere": dict(logit_scale=0.25),
    "cohere2": BOTH,
    "cohere2_moe": BOTH,
    "cohere_compass_text": dict(
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={name: {"rope_type": "default", **THETA} for name in ("full_attention", "sliding_attention")},
    ),
    "ctrl": dict(GPT2, dff=48),
    "cwm": BOTH,
    "data2vec-text": DECODER,
    "dbrx": dict(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0.1),
    ),
    "deepseek_v2": dict(LATENT, **DENSE_SPARSE),
    "deepseek_v3": dict(LATENT, **DENSE_SPARSE),
    "deepseek_v32": dict(LATENT, **DENSE_SPARSE),
    "deepseek_v4": dict(
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        o_groups=2,
        mlp_layer_types=["hash_moe", "moe"],
        compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=8),
    ),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, num_experts_per_tok=2),
    "dots3_note": dict(
        text_config=DOTS3,
        vision_config=dict(
            VISION, num_hidden_layers=1, adapter_in_dim=16, adapter_out_dim=32, mlp_layer_types=["dense"]
        ),
        audio_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            downsample_hidden_size=8,
            adapter_input_size=16,
            adapter_out_dim=32,
        ),
    ),
    "dots3_note_text": DOTS3,
    "electra": DECODER,
    "ernie": DECODER,
    "exaone4": BOTH,
    "exaone_moe": dict(BOTH, **DENSE_SPARSE),
    "falcon": dict(head_dim=..., new_decoder_architecture=True, num_kv_heads=2),
    "falcon alibi": dict(head_dim=..., alibi=True, multi_query=True),
    "falcon_h1": dict(mamba_d_ssm=64),
    "fuyu": dict(text_config={}, vision_config=VISION),
    "gemma2": BOTH,
    "gemma3": dict(text_config=BOTH, vision_config=VISION, mm_tokens_per_image=4),
    "gemma3_text": BOTH,
    "gemma3n_text": GEMMA3N,
    "gemma4": dict(text_config=GEMMA4, vision_config=VISION, audio_config=None),
    "gemma4_text": GEMMA4,
    "gemma4_text experts": dict(
        GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16
    ),
    "gemma4_unified": dict(text_config=dict(BOTH, global_head_dim=8)),
    "gemma4_unified_text": dict(BOTH, global_head_dim=8),
    "git": dict(vision_config=VISION),
    "glm4_moe_lite": dict(LATENT, **DENSE_SPARSE),
    "glm_moe_dsa": dict(LATENT, **DENSE_SPARSE, indexer_types=["full", "shared"]),
    "got_ocr2": dict(
        text_config={}, vision_config=dict(VISION, output_channels=8, mlp_dim=16, global_attn_indexes=[0])
    ),
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": dict(num_layers=2, num_heads=4, window_size=6, attention_types=[[["global", "local"], 1]]),
    "gpt_oss": BOTH,
    "gptj": dict(GPT2, rotary_dim=4),
    "granite": dict(logits_scaling=2.0, attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0),
    "granite_swa": BOTH,
    "granitemoe_swa": BOTH,
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "hy_v4": dict(LATENT, **DENSE_SPARSE, indexer_types=["full", "shared"]),
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2),
    "kimi_linear": dict(LATENT, **LINEAR_FULL, **DENSE_SPARSE),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm3": dict(num_hidden_layers=3, layer_types=["conv", "sliding_attention", "full_attention"]),
    "llama dynamic": dict(rope_parameters=dict(THETA, rope_type="dynamic", factor=4.0)),
    "llama linear": dict(rope_parameters=dict(THETA, rope_type="linear", factor=4.0)),
    "llama llama3": dict(rope_parameters=LLAMA3),
    "llama tied": dict(tie_word_embeddings=True),
    "llama yarn": dict(rope_parameters={k: v for k, v in YARN.items() if k != "llama_4_scaling_beta"}),
    "llama4": dict(text_config=dict(num_hidden_layers=1, intermediate_size_mlp=48), vision_config=LLAMA4_VISION),
    "llama4_text": dict(
        attention_chunk_size=8,
        floor_scale=12,
        intermediate_size_mlp=48,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "longcat_flash": dict(LATENT, zero_expert_num=2),
    "mamba2": dict(num_heads=8, n_groups=2),
    "megatron-bert": DECODER,
    "mellum": dict(BOTH, **DENSE_SPARSE),
    "mimo_v2_flash": dict(BOTH, **DENSE_SPARSE),
    "minicpm3": LATENT,
    "minimax": dict(LINEAR_FULL, block_size=8),
    "minimax_m3_vl_text": dict(
        DENSE_SPARSE,
        rotary_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        layer_types=["full_attention", "indexed_attention"],
    ),
    "ministral": dict(BOTH, head_dim=8),
    "ministral3": dict(sliding_window=..., rope_parameters=YARN),
    "mllama": dict(text_config=dict(cross_attention_layers=[]), vision_config=VISION),
    "moss_transcribe_diarize": dict(
        text_config={}, audio_config=dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16)
    ),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2),
    "nemotron_h": dict(
        hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8, n_groups=1, ssm_state_size=16
    ),
    "olmo3": BOTH,
    "olmo_hybrid": LINEAR_FULL,
    "opt": dict(word_embed_proj_dim=32),
    "phi3": dict(original_max_position_embeddings=24, rope_parameters=LONGROPE, sliding_window=...),
    "phi3 window": dict(sliding_window=10),
    "phi4_multimodal": dict(vision_config=VISION, audio_config=AUDIO),
    "phimoe": dict(router_jitter_noise=0.01, input_jitter_noise=0.1, sliding_window=10),
    "qwen2 window": dict(use_sliding_window=True, sliding_window=10, max_window_layers=1),
    "qwen3_5": dict(text_config=LINEAR_FULL, vision_config=QWEN_VISION),
    "qwen3_5_moe": dict(text_config=LINEAR_FULL, vision_config=QWEN_VISION),
    "qwen3_5_moe_text": LINEAR_FULL,
    "qwen3_5_text": LINEAR_FULL,
    "qwen3_next": LINEAR_FULL,
    "qwen4_exp": dict(text_config=QWEN4, vision_config=QWEN_VISION),
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": dict(lru_width=32, attention_window_size=10, block_types=["recurrent", "attention"]),
    "rembert": dict(DECODER, input_embedding_size=16, output_embedding_size=16),
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": dict(
        DECODER, pronunciation_embed_dim=8, pronunciation_vocab_size=61, shape_embed_dim=8, shape_vocab_size=61
    ),
    "roformer": DECODER,
    "rwkv": dict(attention_hidden_size=32),
    "starcoder2": dict(sliding_window=10),
    "vaultgemma": BOTH,
    "xglm": dict(num_layers=2, attention_heads=4),
    "xlm": dict(causal=True, emb_dim=32, n_layers=2, n_heads=4),
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlstm": dict(v_head_dim=..., head_dim=..., num_heads=4, embedding_dim=32, num_blocks=2),
    "xmod": dict(DECODER, default_language="en_XX"),
    "youtu": LATENT,
    "zamba": dict(
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        attention_head_dim=16,
        attention_hidden_size=64,
    ),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"], mamba_headdim=8, mamba_ngroups=1),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=16),
}
SINCE = {"cohere_compass_text": (5, 23)}  # versions of transformers before do not make these
ZOO: dict[str, dict[str, Any]] = {name: OWN.get(name, {}) for name in sorted({*PLAIN, *OWN})}


def model_type(name: str) -> str:
    """The model type of a member."""
    return name.split()[0]


def make_config(name: str) -> PreTrainedConfig:
    """The tiny config of a member."""
    kind, own = model_type(name), ZOO[name] if name in ZOO else REFUSED[name][1]
    usual = AutoConfig.for_model(kind)
    if "text_config" in own:
        text = _sized(usual.get_text_config(), own["text_config"])
        return AutoConfig.for_model(kind, **own | {"text_config": text})
    return AutoConfig.for_model(kind, **_sized(usual, own))


def _sized(usual: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """The sizes that `usual` has, and the member's own settings; a setting of `...` leaves a size out."""
    sizes = {name: size for name, size in SIZES.items() if _has(usual, name)}
    return {name: value for name, value in (sizes | own).items() if value is not ...}


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        value = getattr(config, name)
    except AttributeError:
        return False
    except Exception:  # differs between layers
        return True
    return "window" not in name or isinstance(value, int)
