"""The stages: each module has `train(config)`, reads a checkpoint directory and data, writes a checkpoint directory."""
