"""The parts that every stage trains with: learner, run, checkpoints, metrics, memory figures, rewards, evaluation."""
