"""Where generation stops by the base model's own word, beside what ends a turn in the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPORTED = "a model that generates is exported with"
FILES = ("generation_config.json", "config.json")


def stop_tokens(folder: Path) -> tuple[str, list[int]]:
    """(file, token ids) of the first file of a model folder that says where generation stops; ("", []) of none."""
    for name in FILES:
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        ids = [token for token in (said if isinstance(said, list) else [said]) if isinstance(token, int)]
        if ids:
            return name, ids
    return "", []


def compared(audit: Mapping[str, Any], folder: Path) -> list[str]:
    """Sentences: does the base model, in ``folder``, stop where the trained turns end?"""
    file, stops = stop_tokens(folder)
    ends = {int(end["id"]): str(end["text"]) for end in audit["end_tokens"]}
    if not ends:
        return []
    texts = {**ends, audit["eos_token"]["id"]: audit["eos_token"]["text"]}
    shown = " and ".join(f"{texts[token]} (id {token})" if token in texts else f"id {token}" for token in stops)
    missed = " and ".join(text for token, text in ends.items() if token not in stops)
    if not stops:
        return [f"note: the model's folder does not say where generation stops; {EXPORTED} {missed}"]
    if not missed:
        return [f"generation stops at {shown}, says {file}: every end that is trained"]
    return [f"note: {file} stops generation at {shown}, not at {missed}, which is trained; {EXPORTED} both"]
