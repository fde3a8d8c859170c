"""The first helper of the batch script: the Plan from the script into the run folder, and the run into our hands.

Exit code 0: go on; 3: the run is finished already; 2: refused (another plan is there, or a live job holds the run).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hpcft.launch.entry import run, say
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.folder import keep_plan, make_folder, refuse_other_plan
from hpcft.run.ledger import Ledger, is_finished
from hpcft.run.paths import STORE_VARIABLE, RunPaths

EXIT_GO_ON = 0
EXIT_FINISHED = 3


def accept(text: str, paths: RunPaths, environ: Mapping[str, str]) -> int:
    """Take up the plan ``text`` for the run at ``paths``; the exit code. Raises Refusal, see the module."""
    plan = Plan.from_json(text, where="the plan in the script")
    make_folder(paths.root)
    refuse_other_plan(plan, paths)
    if is_finished(paths):
        say(f"run {plan.name} is finished: {paths.root}")
        return EXIT_FINISHED
    lease.take(paths, environ, plan.fingerprint)
    keep_plan(text, paths)
    Ledger(paths, "batch", environ).write("accepted", plan=plan.fingerprint, store=environ.get(STORE_VARIABLE))
    return EXIT_GO_ON


def main() -> int:
    text = sys.stdin.buffer.read().decode("utf-8")
    return accept(text, RunPaths.from_environment(), os.environ)


if __name__ == "__main__":
    sys.exit(run(main))
