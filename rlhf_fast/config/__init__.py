"""The configs: one frozen dataclass per stage, which is the Python argument, the flags and the YAML file at once."""

from rlhf_fast.config import clipped, commands, online, serving, stages
from rlhf_fast.config.clipped import *  # noqa: F403
from rlhf_fast.config.commands import *  # noqa: F403
from rlhf_fast.config.online import *  # noqa: F403
from rlhf_fast.config.serving import *  # noqa: F403
from rlhf_fast.config.stages import *  # noqa: F403

__all__ = clipped.__all__ + commands.__all__ + online.__all__ + serving.__all__ + stages.__all__
