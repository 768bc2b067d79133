"""The parts that every stage trains with: learner, run, checkpoints, metrics, memory figures, rewards, evaluation."""

from rlhf_fast.extras import need_train

need_train("rlhf_fast.training")
