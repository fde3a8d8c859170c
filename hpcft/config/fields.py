"""Small value types that both the run and the cluster profile use: safe names, durations, on-off words."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema

from hpcft import clock

# A name reaches file names, job names and `#SBATCH` lines: a newline there would run as code.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
WORD_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:,+@=-]{0,127}$"  # partitions, accounts, memory
FEATURES_PATTERN = r"^[A-Za-z0-9(\[][A-Za-z0-9._:,+@=&|!*()\[\]-]{0,127}$"  # constraints: a100&hbm80g, [rack1|rack2]
SBATCH_OPTION = r"^--[a-z][a-z0-9-]*(=[A-Za-z0-9._:,+@/%=-]+)?$"
ONE_LINE = r"^[^\x00-\x1f\x7f]*$"


def minutes(value: Any) -> Any:
    """Slurm's time words in minutes: 90, "90", "1:30:00", "2-00:00:00", "2-12", "1h30m"; seconds are rounded up.

    A value in no such form is returned as it is, for the model to refuse.
    """
    if isinstance(value, str):
        text = value.strip()
        if units := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text.lower()):
            days, hours, mins = (int(part or 0) for part in units.groups())
            if text:
                return days * 1440 + hours * 60 + mins
        if (read := clock.minutes(text)) is not None:
            return read
    return value


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Word = Annotated[str, StringConstraints(pattern=WORD_PATTERN)]
Line = Annotated[str, StringConstraints(pattern=ONE_LINE)]
Features = Annotated[str, StringConstraints(pattern=FEATURES_PATTERN)]
_TIME_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}  # what an editor may accept
Minutes = Annotated[int, BeforeValidator(minutes), Field(ge=1), WithJsonSchema(_TIME_SCHEMA)]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]  # any lines; a pattern also makes sure of UTF-8
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
