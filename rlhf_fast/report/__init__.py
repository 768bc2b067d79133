"""What a finished run shows: the pipeline of several stages, its plots and its HTML report."""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.report")
