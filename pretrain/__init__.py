"""What is trained and how: configuration, models, objectives, data, the training loop, checkpoints."""
