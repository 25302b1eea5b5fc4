"""How a run starts: command line, local ranks, torchrun, SLURM, DeepSpeed."""
