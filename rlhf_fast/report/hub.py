"""A finished run on the Hugging Face hub: the model with its card, without checkpoints, trackers' files and samples."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf_fast.config import CardConfig
from rlhf_fast.report import card
from rlhf_fast.training.checkpoint import FINISHED
from rlhf_fast.training.listeners import Listener, Running

LEFT_OUT = (
    "checkpoint-*",
    "samples*.json",  # they hold the data set's prompts
    "report.*",
    "metrics.jsonl",
    "reference_logprobs*",
    "tensorboard/*",
    "wandb/*",
    "trackers.json",
    ".*",
    "*/.*",
)
_FAILURES = (HfHubHTTPError, OSError, ValueError)


class Hub(Listener):
    """Pushes the run's directory to the repository `name` at the end of a run that has finished.

    Raises ValueError before the run where the name is none, or where the hub does not know who this is.
    """

    def __init__(self, name: str) -> None:
        self.name, self.api = name, huggingface_hub.HfApi()
        try:
            validate_repo_id(name)
            self.api.whoami()
        except HFValidationError as error:
            raise ValueError(f"push_to_hub: expected a name such as org/name, got {name!r}: {error}") from error
        except _FAILURES as error:
            raise ValueError(f"push_to_hub: expected a hub that knows you (`hf auth login`), got {error}") from error
        self.directory = Path()

    def begin(self, run: Running) -> None:
        """Notes the directory."""
        self.directory = Path(run.config.output_dir)

    def end(self) -> None:
        """Writes the card and uploads. ValueError where the hub does not take it; the model is safe on the disk."""
        if not (self.directory / FINISHED).is_file():
            return
        try:
            card.run(CardConfig(dir=str(self.directory), repo=self.name if "/" in self.name else None))
            self.api.create_repo(self.name, exist_ok=True)
            self.api.upload_folder(
                folder_path=self.directory,
                repo_id=self.name,
                commit_message="Model and card",
                ignore_patterns=list(LEFT_OUT),
            )
        except _FAILURES as error:
            raise ValueError(
                f"push_to_hub: expected the hub to take {self.name}, got {error}; the model is in {self.directory}, "
                f"and `hf upload {self.name} {self.directory}` sends it"
            ) from error
