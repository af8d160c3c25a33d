"""Both formats side by side: model folders and a training run's checkpoints."""
