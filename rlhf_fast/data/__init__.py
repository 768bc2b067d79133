"""Text and rows: reading files, checking rows, turning text into token ids. Nothing here knows a model."""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.data")
