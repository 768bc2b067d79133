"""What a result was made with, so that a later run takes the result only where it would make the same.

run.json and similar notes hold the config, and for each file, model and reward function that the run read the
fingerprint of the content. Where the content is known, it counts in place of its path: a directory may be moved.
"""

from typing import Any

from rlhf_fast.config.fields import describe
from rlhf_fast.training.fingerprint import fingerprints

FREE = {
    "accept_changed",
    "output_dir",
    "push_to_hub",
    "reference_logprobs",
    "resume",
    "reward_timeout",
    "save_steps",
    "save_total_limit",
    "track",
    "vllm_patience",
    "vllm_timeout",
    "vllm_transfer",
    "vllm_url",
}
"""Fields on which no number of a finished run depends."""
_SHOWN = 200  # characters of a value in a message


def made_with(config: Any) -> dict[str, Any]:
    """The part of run.json that `difference` reads: the config, and the fingerprints of what it names."""
    return {"config": describe(config), "made_of": fingerprints(config)}


def difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What a finished run was made with that is otherwise now, as half a sentence; None where all is the same.

    then, now: dicts with the parts of `made_with`.
    """
    if "made_of" not in then:
        return "nothing says what it was made of"
    for name, value in now["config"].items():
        was, old, new = then["config"].get(name), then["made_of"].get(name), now["made_of"].get(name)
        known = old is not None and new is not None
        if name in FREE or (old == new if known else was == value):
            continue
        if was == value:
            return f"the content of {name}, {_short(value)}, has changed"
        return f"{name} is {_short(value)} and was {_short(was)}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
