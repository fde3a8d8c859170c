"""The software that computed something, and when: kept with every checkpoint and every export."""

from __future__ import annotations

import platform
import time

import torch

import hpcft


def software() -> dict[str, str]:
    """Name → version, and the moment as ``written``."""
    import transformers

    return {
        "hpcft": hpcft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
