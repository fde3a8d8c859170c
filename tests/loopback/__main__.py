"""``python -m tests.loopback up|down|status|install``: the private Slurm for people."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.loopback import PACKAGES, LoopbackSlurm, missing_programs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.loopback", description=__doc__)
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("--folder", type=Path, default=Path(".loopback"), help="where the cluster lives (.loopback)")
    parser.add_argument("--nodes", type=int, default=4, help="how many nodes (4)")
    parser.add_argument("--gpus", type=int, default=0, help="pretend GPUs of each node (0)")
    given = parser.parse_args()
    cluster = LoopbackSlurm(given.folder, nodes=given.nodes, gpus=given.gpus)
    try:
        return VERBS[given.verb](cluster)
    except (RuntimeError, TimeoutError, OSError, subprocess.SubprocessError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def _up(cluster: LoopbackSlurm) -> int:
    if not cluster.is_up:
        cluster.up()
    _status(cluster)
    print(f"\nA Slurm of {len(cluster.nodes)} nodes runs on this machine. Type, in the shell you use it from:\n")
    print(f"  export SLURM_CONF={cluster.folder}/slurm.conf")
    print("\nand then, for example:\n")
    print("  srun -N2 -n4 -l hostname")
    print("  sbatch sbatch/loopback/tiny.sbatch")
    print("\nPartitions: batch; low and low0 (preempted by high, with 10 s and no grace).  End it: make slurm-down")
    return 0


def _down(cluster: LoopbackSlurm) -> int:
    was_up = cluster.is_up
    cluster.down()
    print("The private Slurm is down." if was_up else "No private Slurm was up.", file=sys.stderr)
    return 0


def _status(cluster: LoopbackSlurm) -> int:
    if not cluster.is_up:
        print("No private Slurm is up here; make slurm-up starts one.", file=sys.stderr)
        return 1
    print(cluster.run(["sinfo"]).stdout, end="")
    print(cluster.run(["squeue"]).stdout, end="")
    return 0


def _install(_: LoopbackSlurm) -> int:
    """Debian's packages, where this account may install them. Never an error: tests say what they had to skip."""
    if not missing_programs():
        return 0
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    sudo = shutil.which("sudo") is not None
    may = not root or (sudo and subprocess.run([*root, "true"], capture_output=True, check=False).returncode == 0)
    if shutil.which("apt-get") and may:
        print(f"Installing {' '.join(PACKAGES)} …", file=sys.stderr)
        apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run([*apt, *words], stdout=subprocess.DEVNULL, check=False)
    if missing := missing_programs():
        why = "its packages could not be installed" if may else "this account may not install packages"
        print(f"!!! NO SLURM HERE (no {', '.join(missing)}): {why}: {' '.join(PACKAGES)}", file=sys.stderr)
    return 0


def _guard(cluster: LoopbackSlurm) -> int:
    """Wait until whoever holds the other end of stdin is gone, even killed; then take the cluster away."""
    sys.stdin.read()
    cluster.down()
    shutil.rmtree(cluster.folder, ignore_errors=True)
    return 0


VERBS = {"up": _up, "down": _down, "status": _status, "install": _install, "guard": _guard}

if __name__ == "__main__":
    raise SystemExit(main())
