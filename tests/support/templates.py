"""Small equivalents of chat templates that people meet, and tokenizers for them."""

from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_fast.data.turns import note_listed_ends


class Family(NamedTuple):
    """A template, the tokenizer's special tokens, the ends that the generation config lists, and the true end."""

    template: str
    eos: str
    bos: str | None
    special: tuple[str, ...]
    listed: tuple[str, ...]
    end: str


_TURN = "{% for m in messages %}"
_THINK = (
    "{% set seen = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% set seen.last = loop.index %}"
    "{% endfor %}{% set count = namespace(users=0) %}"
)

FAMILIES = {
    "chatml": Family(
        _TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        None,
        ("<|im_start|>",),
        ("<|im_end|>", "<eos>"),
        "<|im_end|>",
    ),
    "gemma": Family(
        "{{ bos_token }}" + _TURN + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<eos>",
        "<bos>",
        ("<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
    ),
    "phi3": Family(
        _TURN + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "<s>",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        (),  # as the first checkpoints: the end stands in the template alone
        "<|end|>",
    ),
    "glm4": Family(
        "[gMASK]<sop>" + _TURN + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|endoftext|>",
        None,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        "<|user|>",
    ),
    "qwen3": Family(
        _THINK + _TURN + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set parts = m.content.split('</think>') %}{% if count.users == seen.last %}<think>\n"
        "{{ parts[0].replace('<think>', '') | trim if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
        "{{ parts[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% if m.role == 'user' %}{% set count.users = count.users + 1 %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_end|>",
        None,
        ("<|im_start|>",),
        ("<|im_end|>",),
        "<|im_end|>",
    ),
    "r1": Family(  # opens an answer by <think>, and writes answers without their reasoning
        "{{ bos_token }}" + _TURN + "{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
        "<|end_of_sentence|>{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|end_of_sentence|>",
        "<|begin|>",
        ("<|User|>", "<|Assistant|>"),
        (),
        "<|end_of_sentence|>",
    ),
    "llama2": Family(
        _TURN + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>",
        (),
        ("</s>",),
        "</s>",
    ),
    "mistral": Family(
        "{{ bos_token }}" + _TURN + "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>",
        ("[INST]", "[/INST]"),
        ("</s>",),
        "</s>",
    ),
    "gpt-oss": Family(
        _TURN + "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if m.role == 'assistant' and loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>",
        None,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
        ("<|return|>", "<|call|>"),
        "<|return|>",
    ),
    "plain words": Family(
        _TURN + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "<eos>",
        None,
        (),
        (),
        "<eos>",
    ),
}


def _special(family: Family) -> list[str]:
    return list(dict.fromkeys(["<pad>", family.eos, family.bos, *family.special, *family.listed]))


def byte_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A token a character, and a few merges that cross words and line breaks; as byte-level BPE writes them."""
    family = FAMILIES[name]
    special = [token for token in _special(family) if token]
    letters = ["\u010a", "\u0120", *map(chr, range(33, 127))]
    merges = [("\u010a", "\u010a"), ("\u0120", "B"), ("l", "u"), ("lu", "e"), ("=", "4")]
    names = dict.fromkeys([*special, *letters, *("".join(pair) for pair in merges)])
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(names)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return _finished(core, family, special)


def piece_tokenizer(name: str, prepend: str) -> PreTrainedTokenizerFast:
    """Of the SentencePiece family. prepend: "legacy" (a space in front of every part) or Metaspace's scheme."""
    family = FAMILIES[name]
    special = ["<unk>", *(token for token in _special(family) if token)]
    letters = ["\n", "\u2581", *map(chr, range(33, 127))]
    scores = [(token, 0.0) for token in special] + [(letter, -8.0) for letter in letters]
    scores += [("\u2581" + word, -4.0) for word in ("Blue", "Red", "a", "joy", "was")] + [("Blue", -5.0), ("=4", -5.0)]
    core = Tokenizer(models.Unigram(scores, unk_id=0))
    if prepend == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=prepend, split=False)
        core.decoder = decoders.Metaspace("\u2581", prepend_scheme=prepend, split=False)
    return _finished(core, family, special)


def _finished(core: Tokenizer, family: Family, special: list[str]) -> PreTrainedTokenizerFast:
    if family.bos:
        ids = [(family.bos, special.index(family.bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=family.eos,
        bos_token=family.bos,
        pad_token="<pad>",
        additional_special_tokens=[token for token in special if token not in (family.eos, family.bos, "<pad>")],
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )
    note_listed_ends(tokenizer, tokenizer.convert_tokens_to_ids(list(family.listed)))
    return tokenizer
