"""Small real models of several architectures, built from configs, and ragged token sequences for them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_fast.lm.sequences import Sequences

ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 30.0},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.1},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48, "dropout": 0.1},
}


def model_config(architecture: str, vocab_size: int) -> dict:
    sizes = {} if architecture == "gpt2" else {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {} if architecture in ("gpt2", "opt") else {"intermediate_size": 64}
    sizes |= {} if architecture == "gpt2" else {"max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return {"model_type": architecture, "vocab_size": vocab_size, **sizes, **ids, **ARCHITECTURES[architecture]}


def random_policy(architecture: str, vocab_size: int = 37, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised model whose logits are spread enough to have a clear argmax."""
    settings = model_config(architecture, vocab_size)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
    return model.eval()


def random_sequences(
    rows: int = 5, prompt: int = 7, response: int = 6, vocab_size: int = 37, seed: int = 0
) -> Sequences:
    """Ragged prompts padded on the left, ragged responses padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(2, vocab_size, (rows, prompt), generator=generator)
    response_ids = torch.randint(2, vocab_size, (rows, response), generator=generator)
    prompt_lengths = torch.randint(1, prompt + 1, (rows, 1), generator=generator)
    response_lengths = torch.randint(1, response + 1, (rows, 1), generator=generator)
    prompt_mask = torch.arange(prompt) >= prompt - prompt_lengths
    response_mask = torch.arange(response) < response_lengths
    return Sequences(prompt_ids * prompt_mask, prompt_mask, response_ids * response_mask, response_mask)
