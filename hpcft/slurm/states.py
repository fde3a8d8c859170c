"""The states of a job, whatever spelling Slurm used for them."""

from __future__ import annotations

import enum
import re


class State(enum.Enum):
    """A job's state: Slurm's own words, and two of ours for what Slurm cannot say."""

    PENDING = "PD"
    CONFIGURING = "CF"
    RUNNING = "R"
    SUSPENDED = "S"
    STOPPED = "ST"
    RESIZING = "RS"
    SIGNALING = "SI"
    STAGE_OUT = "SO"
    COMPLETING = "CG"
    REQUEUED = "RQ"
    REQUEUE_HOLD = "RH"
    REQUEUE_FED = "RF"
    SPECIAL_EXIT = "SE"
    RESV_DEL_HOLD = "RD"
    COMPLETED = "CD"
    CANCELLED = "CA"
    FAILED = "F"
    TIMEOUT = "TO"
    PREEMPTED = "PR"
    NODE_FAIL = "NF"
    BOOT_FAIL = "BF"
    DEADLINE = "DL"
    OUT_OF_MEMORY = "OOM"
    REVOKED = "RV"
    LAUNCH_FAILED = "LF"
    RECONFIG_FAIL = "RC"
    FORGOTTEN = "forgotten"
    """Slurm answers and does not know the job: it ended some minutes ago (MinJobAge), or never was."""
    UNKNOWN = "unknown"
    """Nobody could be asked, or the answer is a word that this release does not know."""

    @classmethod
    def parse(cls, text: str) -> State:
        """The state in ``CANCELLED by 1000``, ``CANCELLED+``, ``OUT_OF_ME+``, ``COMPLETED,COMPLETING``, ``CG`` …"""
        words = re.findall(r"[A-Z_]+", text.strip().split(" ")[0].upper())
        if "COMPLETING" in words:
            return cls.COMPLETING
        given = words[0] if words else ""
        if given in cls.__members__:
            return cls[given]
        codes = [state for state in cls if state.value == given]
        starts = [state for state in cls if len(given) > 3 and state.name.startswith(given)]
        found = codes or starts
        return found[0] if len(found) == 1 else cls.UNKNOWN

    @property
    def alive(self) -> bool:
        """The job waits, runs or is being ended or requeued: it still holds, or may again hold, nodes."""
        return self in _ALIVE

    @property
    def waiting(self) -> bool:
        """The job is in the queue without nodes."""
        return self in _WAITING

    @property
    def finished(self) -> bool:
        """The job has ended and will not come back by itself."""
        return not self.alive and self is not State.UNKNOWN


_WAITING = frozenset(
    {
        State.PENDING,
        State.REQUEUED,
        State.REQUEUE_HOLD,
        State.REQUEUE_FED,
        State.SPECIAL_EXIT,
        State.RESV_DEL_HOLD,
    }
)
_ALIVE = _WAITING | {
    State.CONFIGURING,
    State.RUNNING,
    State.SUSPENDED,
    State.STOPPED,
    State.RESIZING,
    State.SIGNALING,
    State.STAGE_OUT,
    State.COMPLETING,
}
