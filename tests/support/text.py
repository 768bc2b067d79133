"""A tokenizer of six letters, so that token ids can be written out by hand."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_fast.data.encoding import encode_sft

PAD, EOS, BOS, A, B, C, D, E, F = range(9)
USER, ASSISTANT = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """Letters a-f are tokens 3-8; <pad> 0, <eos> 1, <bos> 2."""
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<eos>", "<bos>", *"abcdef"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "bos_token" in special:
        words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def sft(tokenizer, prompt, completion, max_length=99, max_prompt_length=99) -> tuple[list[int], str, int]:
    """Ids of one encoded row, its mask with an `x` for each trained token, the number of truncated rows."""
    encoded = encode_sft([{"prompt": prompt, "completion": completion}], tokenizer, max_length, max_prompt_length)
    ids, mask = encoded.examples[0]
    return ids, "".join("-x"[trained] for trained in mask), encoded.truncated
