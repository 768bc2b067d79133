"""The stages. Each module of a training stage has `train(config)`: a checkpoint and data in, a checkpoint out."""
