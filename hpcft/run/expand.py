"""Shell variables in the Plan's folders and environment, read as the script reads them, for runs without a shell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from hpcft.errors import refuse
from hpcft.plan.plan import Plan

# ${NAME}, ${NAME:-default}, and $NAME where a value starts with it. A default may not hold anything that expands.
REFERENCE = re.compile(
    r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^\s\"'`$\\{}]*))?\}|^\$(?P<first>[A-Za-z_]\w*)", re.ASCII
)


def expanded(text: str, environ: Mapping[str, str], where: str = "") -> str:
    """``text`` with its variables' values. Raises Refusal for a variable that is not set and has no default."""

    def value(match: re.Match[str]) -> str:
        name = match["name"] or match["first"]
        if environ.get(name) or (name in environ and match["default"] is None):
            return environ[name]
        if match["default"] is None:
            raise refuse(f"${name} is not set on this machine", where=where, value=text)
        return match["default"]

    return REFERENCE.sub(value, text)


def exported(plan: Plan, environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` with the plan's variables, each seeing those before it, as the script exports them."""
    found = dict(environ)
    for variable in plan.environment:
        found[variable.name] = expanded(variable.value, found, f"environment.{variable.name}")
    return found


def run_folder(plan: Plan, environ: Mapping[str, str] | None = None) -> Path:
    """The run's folder as the job will find it, with this directory as the submit directory; absolute."""
    environ = os.environ if environ is None else environ
    return Path(expanded(plan.folders.runs, environ, "folders.runs")).absolute() / plan.name


def store_folder(plan: Plan, environ: Mapping[str, str] | None = None) -> Path:
    """The folder of prepared data, likewise."""
    environ = os.environ if environ is None else environ
    return Path(expanded(plan.folders.store, environ, "folders.store")).absolute()
