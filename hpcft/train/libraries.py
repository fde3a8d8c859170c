"""transformers and peft, imported once and early, and without what they would bring and nobody needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hpcft.plan.plan import Plan


def import_libraries(plan: Plan) -> None:
    """What the model will need: seconds of imports, before anything waits for this rank."""
    importlib.import_module("transformers.modeling_utils")
    if plan.tuner.kind == "lora":
        with absent("bitsandbytes"):
            importlib.import_module("peft")


@contextmanager
def absent(package: str) -> Iterator[None]:
    """Meanwhile ``package`` cannot be imported and is not found, unless it was imported before.

    peft, left to itself, imports bitsandbytes wherever it is installed, and with it the compiler of torch: two seconds,
    for adapters that are made before a base is quantised.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
