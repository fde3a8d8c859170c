"""What every rank runs: ``python -m hpcft.train.main``, the run's folder in HPCFT_RUN.

Signals first, slow imports after: a signal during them must not end a rank. Exit codes: 0 finished, 75 stopped on
purpose, 2 refused, 1 failed. The process ends with os._exit: waiting for peers that are gone would be a hang.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from hpcft.errors import EXIT_REFUSED, Refusal, count
from hpcft.plan.memory import measured
from hpcft.plan.place import place_from_environment
from hpcft.plan.plan import Plan
from hpcft.run.folder import read_plan
from hpcft.run.ledger import Ledger
from hpcft.run.paths import RunPaths
from hpcft.slurm.environment import own_job_id
from hpcft.train.caches import keep_to_ourselves
from hpcft.train.signals import SIGNALS
from hpcft.train.timeline import Timeline

if TYPE_CHECKING:
    from hpcft.train.loop import Run

EXIT_FINISHED, EXIT_FAILED, EXIT_STOPPED = 0, 1, 75
GRACE_VARIABLE = "HPCFT_STOP_SECONDS"  # how long a step may take once a stop was asked for
LEFT_TO_AFTER = 60.0  # seconds of the warning
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")


def main(environ: Mapping[str, str] | None = None) -> int:
    """One rank from start to end; its exit code."""
    environ = os.environ if environ is None else environ
    SIGNALS.install()
    paths, ledger = RunPaths.from_environment(environ), None
    try:
        plan = read_plan(paths)
        ledger = Ledger(paths, f"rank-{place_from_environment(environ, plan.layout).rank:04d}", environ)
        SIGNALS.watch(*stop_seconds(plan, environ))
        return run_rank(plan, paths, ledger, environ)
    except BaseException as error:
        return report_failure(error, ledger, environ)


def stop_seconds(plan: Plan, environ: Mapping[str, str]) -> tuple[float, float]:
    """How long a step may take after TERM, and after USR2; outside of Slurm as long as the ranks wait for each other.

    USR2 comes ``signal_lead`` before the end: a minute of it is left to ``after``, which requeues.
    """
    if own := environ.get(GRACE_VARIABLE):
        return float(own), float(own)
    if own_job_id(environ) is None:
        return (float(plan.train.collective_timeout),) * 2
    lead = plan.resources.signal_lead
    return max(lead, 30.0), max(lead - LEFT_TO_AFTER, lead / 2)


def run_rank(plan: Plan, paths: RunPaths, ledger: Ledger, environ: Mapping[str, str]) -> int:
    """Import, meet, assemble, train."""
    clock = Timeline(ledger, place_from_environment(environ, plan.layout).rank)
    go_offline()
    keep_to_ourselves(os.environ)
    # torch's FSDP calls torch's collectives by names that torch has given up: nothing a run could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from hpcft.train import assemble, libraries, loop, world

    libraries.import_libraries(plan)
    clock("imports")
    here = world.join(plan, environ)
    clock("process group")
    run = assemble.assemble(plan, paths, here, SIGNALS, environ, clock)
    if here.first:
        resumed = run.progress.step
        checkpoint = paths.checkpoint(resumed).name if resumed else None
        ledger.write("started", step=resumed, checkpoint=checkpoint, world=here.size, phases=clock.phases)
        run.console.say(opening(run))
    finished = loop.train(run, lambda: clock("first step"))
    if foretold := measured(plan, run.interval.peak):
        run.console.say(foretold)
    run.metrics.close()
    run.console.close()
    if finished and here.first:
        ledger.write("finished", step=run.progress.step)
        merge = " --merge" if plan.only_merged else ""
        print(f"finished at step {run.progress.step}; next: hpcft export {paths.root}{merge}", flush=True)
    here.barrier()
    return EXIT_FINISHED if finished else EXIT_STOPPED


def opening(run: Run) -> str:
    """One line: where the run begins and what is trained."""
    skeleton = run.sharded.skeleton
    trained, whole = (sum(map(math.prod, shapes.values())) for shapes in (skeleton.trained, skeleton.shapes))
    return (
        f"step {run.progress.step} of {run.total_steps} on {count(run.world.size, 'rank')}; "
        f"{trained:,} of {whole:,} weights trained; {run.order.windows:,} windows, {run.order.global_windows} a step"
    )


def go_offline() -> None:
    """Ranks never ask a hub: what is not in the cache was not submitted."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"


def report_failure(error: BaseException, ledger: Ledger | None, environ: Mapping[str, str]) -> int:
    """Say it in the rank's log and in the ledger, where ``hpcft status`` finds it; the exit code."""
    refused = isinstance(error, Refusal)
    with suppress(OSError):  # a full disk, say; the exit code is what must come
        say(error)
    if ledger is not None:
        node = environ.get("SLURMD_NODENAME") or os.uname().nodename
        rank = int(ledger.path.stem.rpartition("-")[2])
        facts = {"error": explain(error), "where": where(error), "peer": lost_peer(error), "refused": refused}
        with suppress(OSError):
            ledger.write("failed", rank=rank, node=node, **facts)
    return EXIT_REFUSED if refused else EXIT_FAILED


def say(error: BaseException) -> None:
    """The rank's last words: a refusal speaks for itself, anything else shows where it came from."""
    if isinstance(error, Refusal):
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)
    print(f"this rank ends: {explain(error)}", file=sys.stderr, flush=True)


def explain(error: BaseException) -> str:
    """One line for people; out of memory gets what can be done about it."""
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if type(error).__name__ == "OutOfMemoryError":
        text += (
            "; the GPU is full: lower per_device_train_batch_size (the mathematics stays the same), "
            "set gradient_checkpointing: full, or lower max_length"
        )
    return text


def lost_peer(error: BaseException) -> bool:
    """Did another rank end first? Then its own line says why, not this one's."""
    if type(error).__name__ in ("PeerLost", "DistBackendError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)


def where(error: BaseException) -> str:
    """file:line of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""


def end(code: int) -> None:
    """Leave at once, with what can still be written written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    code = EXIT_FAILED
    try:
        code = main()
    except BaseException as error:
        with suppress(OSError):
            say(error)
    finally:
        end(code)
