"""The first helper of the batch script: the Plan from the script into the run folder, and the run into our hands.

In an array, with ``--element NUMBER --runs FOLDER``, the Plan is that element's, and the run's folder is printed.
Exit code 0: go on; 3: the run is finished already; 2: refused (another plan is there, or a live job holds the run).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcft.errors import Refusal
from hpcft.launch import batchlog
from hpcft.launch.array import element
from hpcft.launch.entry import EXIT_OUT_OF_REACH, run, say
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.folder import keep_plan, make_folder, refuse_other_plan
from hpcft.run.ledger import Ledger, is_finished
from hpcft.run.paths import STORE_VARIABLE, RunPaths
from hpcft.slurm.commands import pauses

EXIT_GO_ON = 0
EXIT_FINISHED = 3
PATIENCE_SECONDS = 900  # of a job that has its nodes, for an answer without which it would have to give them back


def accept(text: str, paths: RunPaths, environ: Mapping[str, str]) -> int:
    """Take up the plan ``text`` for the run at ``paths``; the exit code. Raises Refusal, see the module."""
    plan = Plan.from_json(text, where="the plan in the script")
    make_folder(paths.root)
    refuse_other_plan(plan, paths)
    if _finished(plan, paths):
        return EXIT_FINISHED
    _take(paths, environ, plan)
    try:  # once more: the job that had the run until now may have brought another plan, or finished
        refuse_other_plan(plan, paths)
        if _finished(plan, paths):
            lease.release(paths, environ)
            return EXIT_FINISHED
    except Refusal:
        lease.release(paths, environ)
        raise
    keep_plan(text, paths)
    ledger, store = Ledger(paths, "batch", environ), environ.get(STORE_VARIABLE)
    ledger.write("accepted", plan=plan.fingerprint, store=store, batch_log=batchlog.own())
    return EXIT_GO_ON


def _finished(plan: Plan, paths: RunPaths) -> bool:
    if finished := is_finished(paths):
        say(f"run {plan.name} is finished: {paths.root}")
    return finished


def _take(paths: RunPaths, environ: Mapping[str, str], plan: Plan) -> None:
    """Take the run; while it cannot be found out whether another job holds it, this one waits rather than ends."""
    unanswered: lease.Unanswered | None = None
    for _ in pauses(PATIENCE_SECONDS):
        try:
            lease.take(paths, environ, plan.fingerprint)
            return
        except lease.Unanswered as error:
            if unanswered is None:
                say(f"{error.problems[0].what}; asking again for {PATIENCE_SECONDS / 60:.0f} minutes")
            unanswered = error
    assert unanswered is not None
    raise unanswered


def accept_element(script: str, number: str, runs: Path, environ: Mapping[str, str]) -> int:
    """The same for element ``number`` of an array, whose Plan says which folder under ``runs`` is its own."""
    text = element(script, number)
    paths = RunPaths((runs / Plan.from_json(text, where=f"element {number} of the array").name).absolute())
    code = accept(text, paths, environ)
    print(paths.root)
    return code


def _arguments(words: Sequence[str]) -> tuple[str, Path]:
    parser = argparse.ArgumentParser(prog="hpcft.launch.accept")
    parser.add_argument("--element", required=True)
    parser.add_argument("--runs", required=True, type=Path)
    found = parser.parse_args(words)
    return found.element, found.runs


def main() -> int:
    text = sys.stdin.buffer.read().decode("utf-8")
    if sys.argv[1:]:
        return accept_element(text, *_arguments(sys.argv[1:]), os.environ)
    return accept(text, RunPaths.from_environment(), os.environ)


if __name__ == "__main__":
    sys.exit(run(main, out_of_reach=EXIT_OUT_OF_REACH))
