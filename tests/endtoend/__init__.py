"""hpcft as a person uses it: real command lines, real processes, a real Slurm."""
