"""Secrets in a cluster profile: what it says is rendered into scripts that are committed, and into the plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hpcft.config.cluster import ClusterProfile
from hpcft.config.source import Given
from hpcft.errors import Problem

_NAME = re.compile(r"(TOKEN|API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY|SECRET|PASSWORD|PASSWD|JWT)$", re.IGNORECASE)
# What stands for a secret, or is none: a variable of the job's, what a command prints, a switch (HF_HUB_…_TOKEN: 1).
_HARMLESS = re.compile(
    r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*(:-)?\}|\(.*)|`.*|\d{0,6}|true|false|yes|no|on|off", re.IGNORECASE | re.DOTALL
)
_SET = re.compile(r"""\b([A-Za-z_]\w*)=("[^"]*"?|'[^']*'?|[^\s;&|"']*)""")
_IN_ADDRESS = re.compile(r"://[^/\s:@$]+:[^/\s@$]+@")


def secrets(profile: ClusterProfile, places: Mapping[tuple[str, ...], Given]) -> Iterator[Problem]:
    """A problem for each; none of them repeats the secret."""
    for name, value in profile.environment.items():
        where = places[("environment", name)].origin
        yield from _problems(f"environment: {name}", name, value, where)
    for line in profile.setup:
        for name, value in _SET.findall(line):
            yield from _problems(f"setup: {name}", name, value.strip("\"'"), places[("setup",)].origin)


def _problems(what: str, name: str, value: str, where: str) -> Iterator[Problem]:
    if _NAME.search(name) and not _HARMLESS.fullmatch(value):
        hint = f'export {name}="$(cat FILE)" as a setup line, with FILE for you alone (chmod 600)'
        told = "is a secret by its name, and would stand in every script and plan"
        yield Problem(f"{what} {told}", where, hint=f"export it where you call sbatch, which hands it on; or: {hint}")
    elif _IN_ADDRESS.search(value):
        told = "has a password in an address, which would stand in every script and plan"
        yield Problem(f"{what} {told}", where, hint="export it where you call sbatch, which hands it on")
