"""Whether a model has a position for every token it is going to see, and an embedding for its id.

The stages check this before the first step. Otherwise a model with a table of positions would fail somewhere inside
with an index error, and a model with rotary positions would compute on, beyond the lengths that it was made for.

The longest row of a pass decides which rotary tables a model with LongRoPE takes for all rows. Rows on both sides of
that length therefore never share a pass, and no completion crosses it.
Left out: cutting rows to fit, which `data` does.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.lm.switches import is_dynamic, rotaries, switching_length


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence in tokens that the model was made for, with the scaling of its rotary embedding.

    None where the length has no limit, or where the config names none. With dynamic NTK the length is the one before
    any scaling, because past it the rotary embedding of every token depends on how long the longest row of a pass is.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    if is_dynamic(config):
        return positions
    rotary = rotaries(config)[0]
    scaled = (rotary.get("original_max_position_embeddings") or positions) * (rotary.get("factor") or 1)
    return max(positions, int(scaled))


def sides(config: PreTrainedConfig, counts_B: Tensor) -> list[Tensor]:
    """The rows [n] of each pass, where rows of so many tokens [B] may not all share one; [] where they may."""
    limit = switching_length(config)
    if limit is None:
        return []
    long_B = counts_B > limit
    found = [rows for rows in ((~long_B).nonzero().squeeze(1), long_B.nonzero().squeeze(1)) if len(rows)]
    return found if len(found) > 1 else []


def check_completions(model: PreTrainedModel, lengths: str, prompts: Sequence[int], response: int) -> None:
    """ValueError where `response` tokens behind prompts of so many tokens cross the length of `switching_length`.

    lengths: names of the arguments that bound the lengths, for the message.
    """
    limit = switching_length(model.config)
    longest = max((length for length in prompts if limit and length <= limit), default=0)
    if limit is not None and longest + response > limit and longest:
        raise ValueError(
            f"{lengths}: expected prompts and completions on one side of {limit} tokens, where {model.name_or_path} "
            f"switches its rotary embedding (LongRoPE), got a row of {longest} + {response} = {longest + response}"
        )


def check_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    lengths: str,
    *,
    role: str = "model",
    response: int = 0,
) -> None:
    """ValueError unless `model` can read these token ids, and `response` further tokens behind each row.

    lengths: names of the arguments that bound the rows' length. role: what the model is. Both are for the message.
    """
    if not any(rows):
        return
    last = max(max(row) for row in rows if row)
    embeddings = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    if last >= embeddings:
        raise ValueError(
            f"{role}: expected an embedding for every token of the data, got {embeddings} in {model.name_or_path} and "
            f"the token {tokenizer.convert_ids_to_tokens(last)!r} with id {last}"
        )
    longest, limit = max(map(len, rows)), context_length(model.config)
    if limit is not None and longest + response > limit:
        got = f"{longest} + {response} = {longest + response}" if response else longest
        raise ValueError(
            f"{lengths}: expected at most {limit} tokens, for which the {role} {model.name_or_path} has positions, "
            f"got a row of {got}"
        )
    if response:
        check_completions(model, lengths, [len(row) for row in rows], response)
