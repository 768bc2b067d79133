"""Going on with a run that was cut off: from which checkpoint, under which config, with which models."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_fast.config import OfflineConfig, OnlineConfig, StageConfig
from rlhf_fast.config.fields import describe
from rlhf_fast.config.stages import KINDS
from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import OURS
from rlhf_fast.lm import adapters
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.training import checkpoint
from rlhf_fast.training.fingerprint import fingerprints
from rlhf_fast.training.made import FREE

RUN_CONFIG = "run_config.json"  # in every checkpoint
MADE_OF = "made_of"  # its key for the fingerprints of what the run reads
REWARD_FAILED = f"{OURS}reward-failed"  # in an output_dir: a reward function ended the run, and may be mended

_PARTS: dict[str, type] = {"step": int, "train_seconds": float, "facts": dict, "metrics": str}  # of every state.pt

# Fields that a resumed run may change: where it writes, what it shows, how it fits into memory.
_MAY_CHANGE = FREE | {"eval_steps", "max_logprob_drift", "max_mismatch"}
_MAY_CHANGE |= {"micro_batch_size", "gradient_checkpointing", "offload", "shard", "shard_base"}


def load_policy_and_reference(
    config: OnlineConfig | OfflineConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The policy to train, on `device`, and the frozen reference, which the caller still has to place.

    With LoRA the reference is another model object on the policy's weights, unless config.reference names a model of
    another base, or config.frozen_dtype asks for another dtype. The object has no adapter; where config.reference names
    an adapter, it has that adapter, frozen.
    """
    lora, reference = adapters.lora_of(config), config.reference or config.model
    policy = load_trained(config, device)
    on_policy = lora is not None and adapters.stands_on(policy, adapters.base_path(reference))
    on_policy = on_policy and config.frozen_dtype in (None, config.dtype)
    shared = policy if on_policy else None
    return policy, load_policy(
        reference, dtype=config.frozen_weights, trainable=False, shared=shared, shard=config.shard
    )


def load_trained(config: OnlineConfig | OfflineConfig, device: torch.device) -> PreTrainedModel:
    """The policy to train, on `device`."""
    start, lora = resume_directory(config) or config.model, adapters.lora_of(config)
    return load_policy(start, dtype=config.dtype, lora=lora, shard=config.shard).to(device)  # pyright: ignore[reportArgumentType]


def resume_directory(config: StageConfig, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The checkpoint that this run continues from, or None; stages load their trained models from it.

    It is the newest checkpoint whose files are as they were saved. A reward function that ended the run may have
    changed. say: gets a line where a newer one is damaged, and
    where something that `accept_changed` names is not what the run has read before.

    Raises ValueError where a run with another config, or on other rows, models or rewards wrote the checkpoint. With a
    constant learning rate the new config may have more steps (offline stages: epochs). With any other schedule it may
    not, because a longer run would have decayed its learning rate differently from the start.
    """
    found, passed = checkpoint.newest_whole(config.output_dir) if config.resume else (None, [])
    if found is None:
        return None
    for damaged in passed:
        say(f"{damaged}; the run goes on from {found.name}")
    if not (found / RUN_CONFIG).is_file():
        raise ValueError(f"resume: expected a checkpoint with its {RUN_CONFIG}, found none in {found}")
    length = "steps" if isinstance(config, OnlineConfig) else "epochs"
    now, content = describe(config), fingerprints(config)
    written = read_json(found / RUN_CONFIG)
    read = written.pop(MADE_OF, {})
    for name, then in written.items():
        longer = name == length and config.lr_schedule == "constant" and now[name] > then
        free = name in _MAY_CHANGE or name in config.accept_changed or longer
        same = now.get(name) == then or (name in read and read[name] == content.get(name))
        if not same and not free:
            raise ValueError(f"{name}: expected {then!r} as in the run to resume, {found}, got {now.get(name)!r}")
    for name, then in read.items():
        if content.get(name) in (then, None):
            continue
        mended = KINDS[name] == "reward" and Path(config.output_dir, REWARD_FAILED).is_file()
        if name not in config.accept_changed and not mended:
            raise ValueError(
                f"{name}: expected the {KINDS[name]} of the run to resume, {found}, but the content of {now[name]} has "
                f"changed; --accept-changed {name} goes on with it"
            )
        say(f"the content of {name} has changed since {found.name}; the run goes on with it")
    return found


def state_in(directory: Path, names: Iterable[str]) -> dict[str, Any]:
    """The state of a run's checkpoint. names: of the parts that it has beside the step, the clock, facts and metrics.

    Raises ValueError, naming the file, where a part is missing or of another kind, and for the state of another step.
    """
    state, file = checkpoint.load_state(directory), directory / "state.pt"
    if missing := sorted({*names, *_PARTS} - state.keys()):
        raise ValueError(f"{file}: expected the state of {', '.join(missing)}, found none")
    for name, kind in _PARTS.items():
        if not isinstance(state[name], kind):
            raise ValueError(f"{file}: expected {name} of type {kind.__name__}, got {type(state[name]).__name__}")
    if directory.name != f"checkpoint-{state['step']}":
        raise ValueError(f"{file}: expected the state after the step of {directory.name}, got step {state['step']}")
    return state
