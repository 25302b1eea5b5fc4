"""Models from elsewhere to checkpoints, and checkpoints to elsewhere."""
