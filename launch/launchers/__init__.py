"""``farspan launch``: a run started here, by torchrun, under SLURM, by DeepSpeed's launcher, and started again."""
