"""Whether a model has a position for every token it is going to see, and an embedding for its id.

Found out here, before the first step: a model with a table of positions fails with an index somewhere inside
otherwise, and one with rotary positions computes on, beyond the lengths it was made for.
Left out: cutting rows to fit, which is `data`'s.
"""

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence the model was made for, with its rotary embedding's scaling; None where there is no end."""
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
    """ValueError unless `model` can read these token ids, each row with `response` tokens more.

    lengths: the arguments that bound the rows' length. role: what the model is.
    """
    if not any(rows):
        return
    last = max(max(row) for row in rows if row)
    embeddings = model.get_input_embeddings().weight.shape[0]
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
