"""Whether a model has a position for every token it is going to see, and an embedding for its id.

The stages check this before the first step. Otherwise a model with a table of positions would fail somewhere inside
with an index error, and a model with rotary positions would compute on, beyond the lengths that it was made for.
Left out: cutting rows to fit, which `data` does.
"""

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence in tokens that the model was made for, with the scaling of its rotary embedding.

    None where the length has no limit, or where the config names none.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    rotary = getattr(text, "rope_parameters", None) or {}
    scaled = (rotary.get("original_max_position_embeddings") or positions) * (rotary.get("factor") or 1)
    return max(positions, int(scaled))


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
