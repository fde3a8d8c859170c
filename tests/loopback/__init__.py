"""A private Slurm for tests and for people who want a cluster to try hpcft on."""

from tests.loopback.cluster import PACKAGES, LoopbackSlurm, missing_programs

__all__ = ["PACKAGES", "LoopbackSlurm", "missing_programs"]
