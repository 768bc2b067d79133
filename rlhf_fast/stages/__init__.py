"""The stages. Each module of a training stage has `train(config)`: a checkpoint and data in, a checkpoint out."""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.stages")
