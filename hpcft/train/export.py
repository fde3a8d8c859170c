"""A checkpoint as an ordinary Hugging Face folder, checked by loading it back and published by one rename.

    python -m hpcft.train.export --run runs/x [--checkpoint latest|best|STEP|FOLDER] [--merge] [--dtype bfloat16]

One process on the CPU, without a process group, from the directory the run was submitted from. The folder's path is
printed on stdout, everything else on stderr. Exit codes: 0 done, 2 refused, 1 failed.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpcft import disk
from hpcft.errors import EXIT_REFUSED, Refusal, refuse
from hpcft.plan.plan import QUANTISED, Plan
from hpcft.run.expand import store_folder
from hpcft.run.folder import read_plan
from hpcft.run.manifest import Manifest
from hpcft.run.paths import STORE_VARIABLE, RunPaths
from hpcft.train.facts import check_facts
from hpcft.train.pick import ADAPTER, MERGED, MODEL, Identity, Say, check_base, choose, kind_of

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
SAMPLES, SAMPLE_TOKENS = 4, 64
DTYPE_NAMES = ("bfloat16", "float32", "float16")


@dataclass(frozen=True)
class Wish:
    """What a person asks for. checkpoint, fallback: as ``pick.choose`` takes them; store: of the prepared data."""

    checkpoint: str = ""
    output: Path | None = None
    merge: bool = False
    dtype: str | None = None
    fallback: bool = False
    store: Path | None = None


def export(paths: RunPaths, wish: Wish, say: Say = lambda sentence: None) -> Path:
    """The exported folder, written now or found as it was written before; progress goes to ``say``.

    Raises Refusal for what cannot be exported, Unfaithful where the folder would not be the trained model.
    """
    plan = read_plan(paths)
    kind = kind_of(plan, wish.merge)
    check_base(plan, paths)
    manifest = choose(paths, plan, wish.checkpoint, wish.fallback, say)
    plan = plan.with_labels(manifest.facts["objective"]["labels"]) if plan.labelled else plan
    check_facts(manifest, plan, manifest.data)
    identity = Identity.of(kind, wish.dtype or _own_dtype(plan, kind), manifest)
    target = (wish.output or paths.export(manifest.step, wish.merge)).absolute()
    if already_there(target, identity):
        say("it is there already, whole; nothing was written")
        return target
    try:
        with published(target) as folder:
            _write(folder, plan, paths, manifest, identity, wish, say)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not already_there(target, identity):
            raise
        say("another export has put the same there meanwhile; nothing was written")
    return target


def _write(
    folder: Path, plan: Plan, paths: RunPaths, manifest: Manifest, identity: Identity, wish: Wish, say: Say
) -> None:
    """All files of the export. The weights come first: writing them leaves configurations that are replaced after."""
    from hpcft.train import card, merging, provenance, weights
    from hpcft.train.precision import DTYPES
    from hpcft.train.reader import Reader
    from hpcft.train.speech import speech

    store = wish.store or store_of(plan)
    prepared = prepared_manifest(store, manifest.data)
    words = speech(plan, prepared["audit"] if prepared else None)
    samples = samples_of(store, prepared, len(words.tokenizer))
    compute = {ADAPTER: plan.model.dtype, MERGED: "float32"}.get(identity.kind, identity.dtype)
    held = _size(weights.memory(plan, DTYPES[compute]))
    say(f"{identity.kind} of step {identity.step} as {identity.dtype}: written, then loaded back; {held} in memory")
    writer = {
        ADAPTER: weights.write_adapter,
        MODEL: partial(weights.write_model, padding=words.padding),
        MERGED: partial(merging.write_merged, padding=words.padding),
    }
    with Reader(manifest.folder, manifest) as reader:
        written = writer[identity.kind](plan, reader, folder, DTYPES[identity.dtype], samples)
    words.write(folder, generates=not plan.scored)
    windows = prepared["splits"]["train"]["windows"] if prepared else None
    told = provenance.facts(plan, paths, manifest, identity, windows, words, written)
    card.write(folder, plan, told, words)
    for line in _findings(plan, told, words, written):
        say(line)


def _findings(plan: Plan, told: dict[str, Any], words: Any, written: Any) -> Iterator[str]:
    """What came out, one sentence each; warnings last."""
    steps = told["training"]["total_steps"]
    again = written.reloaded
    number = plan.number
    yield f"loaded back, its {number}s are the trained model's (difference {again.largest:.2g} of {again.scale:.3g})"
    if change := written.merged:
        yield (
            f"merging moved the largest-changed {number} by {change.largest:.3g} (largest {number} {change.scale:.3g})"
            + ("" if plan.scored else f"; the {_likeliest(change)}")
        )
    if cost := written.quantised:
        yield (
            f"it was trained on a base in {QUANTISED[plan.model.quantization]}; beside the original base the "
            f"largest-changed {number} differs by {cost.largest:.3g} (largest {number} {cost.scale:.3g})"
            + ("" if plan.scored else f", and the {_likeliest(cost)}")
        )
    if not plan.scored:
        yield f"generation stops at {', '.join(words.stops) or 'no token at all'}"
    if steps and told["training"]["step"] < steps:
        yield f"note: the run was at step {told['training']['step']} of {steps} then"
    if Path(plan.model.path).is_absolute() and told["export"]["kind"] == ADAPTER:
        yield "note: the base is named by a path of this machine; change base_model_name_or_path before you share it"
    if not words.stops and not plan.scored:
        yield "WARNING: neither tokenizer nor data has a token that ends a turn: generation runs to its limit"
    for warning in written.warnings:
        yield f"WARNING: {warning}"


def _likeliest(change: Any) -> str:
    return f"likeliest next token is the same at {change.same} of {change.positions} positions"


def _own_dtype(plan: Plan, kind: str) -> str:
    """An adapter keeps its float32 masters; a model is written in the type of its base, or of its training."""
    from hpcft.train.model import load_config

    if kind == ADAPTER:
        return "float32"
    name = str(getattr(load_config(plan.model), "dtype", None) or plan.model.dtype).removeprefix("torch.")
    return name if name in DTYPE_NAMES else plan.model.dtype


def already_there(target: Path, identity: Identity) -> bool:
    """True where ``target`` is this very export, whole. Raises Refusal where it is anything else."""
    if not target.exists() and not target.is_symlink():
        return False
    if target.is_dir() and not any(target.iterdir()):
        return False
    found, whole = _found(target)
    if whole and found == asdict(identity):
        return True
    what = f"{found['kind']} of step {found['step']} as {found['dtype']}" if found else "something else"
    raise refuse(f"there is {what} already" + (", not whole" if found and not whole else ""), value=target,
                 hint="give another place with --output, or remove it")  # fmt: skip


def _found(target: Path) -> tuple[dict[str, Any], bool]:
    """The identity of the export at ``target``, {} where it is none, and whether all its files are there."""
    try:
        told = json.loads((target / "hpcft.json").read_text(encoding="utf-8"))
        found, files = {key: told["export"][key] for key in ("kind", "dtype", "step", "state")}, told["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}, False
    return found, all(
        (target / name).is_file() and (target / name).stat().st_size == f["bytes"] for name, f in files.items()
    )


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it by one rename when the block ends well, else vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".tmp-{target.name}.{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        for path in (*folder.iterdir(), folder):
            disk.sync(path)
        os.rename(folder, target)
        disk.sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def store_of(plan: Plan) -> Path | None:
    """Where the prepared data lies, as the job was told or the plan says; None where that is not known here."""
    if told := os.environ.get(STORE_VARIABLE):
        return Path(told)
    try:
        return store_folder(plan)
    except Refusal:  # $SCRATCH and the like are not set here
        return None


def prepared_manifest(store: Path | None, content: str) -> dict[str, Any] | None:
    """What the data says of itself that the checkpoint was trained on; None where it is not in ``store``."""
    try:
        return dict(json.loads((store / content / "manifest.json").read_text(encoding="utf-8"))) if store else None
    except (OSError, ValueError, TypeError):
        return None


def samples_of(store: Path | None, prepared: dict[str, Any] | None, vocabulary: int) -> list[list[int]]:
    """Token sequences to try the model on.

    The run's own first documents, cut; where the prepared data is not at hand, made-up ones, always the same.
    """
    from hpcft.data.shards import Windows

    if store is None or prepared is None:
        return [[(1 + 7 * n + 13 * i * i) % vocabulary for i in range(SAMPLE_TOKENS // 2)] for n in range(SAMPLES)]
    windows = Windows(store / prepared["content"], "train", prepared["splits"]["train"])
    first = [windows[i] for i in range(min(SAMPLES, len(windows)))]
    return [w.tokens[: min(w.documents[0], SAMPLE_TOKENS)].tolist() for w in first]


def summary(folder: Path, plan: Plan) -> str:
    """What is in the folder, and what to type next."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    width = max(map(len, sizes))
    files = [f"  {name:<{width}}  {_size(size):>9}" for name, size in sizes.items()]
    load = f"AutoModelFor{'SequenceClassification' if plan.scored else 'CausalLM'}.from_pretrained({str(folder)!r})"
    if "adapter_config.json" in sizes:
        load = f"PeftModel.from_pretrained(base, {str(folder)!r})"
    return "\n".join(
        [
            f"{len(files)} files, {_size(sum(sizes.values()))}:",
            *files,
            f"next: {load}; README.md there has the whole snippet",
            f"to share it: hf upload YOUR-NAME/{shlex.quote(plan.name)} {shlex.quote(str(folder))}",
        ]
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hpcft.train.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument(
        "--checkpoint", default="", help="latest, best, a step or a folder (best where the plan keeps it)"
    )
    parser.add_argument("--output", type=Path, help="where to (default: RUN/export/step-…)")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base, in float32")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="default: adapters float32, models as their base")
    parser.add_argument("--fallback", action="store_true", help="take an earlier checkpoint where this one is broken")
    parser.add_argument("--store", type=Path, help="the prepared data (default: HPCFT_STORE, else the plan's)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Export; the exit code."""
    from hpcft.train.libraries import absent
    from hpcft.train.main import go_offline

    given = parse(words)
    go_offline()
    _quiet()
    paths = RunPaths(given.run.absolute())
    wish = Wish(given.checkpoint, given.output, given.merge, given.dtype, given.fallback, given.store)
    try:
        with absent("deepspeed"):  # it is for training, and has words for the stdout of programs
            folder = export(paths, wish, _say)
    except Refusal as refusal:
        _say(refusal.report)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        _say("interrupted; nothing was published")
        return EXIT_INTERRUPTED
    except Exception as error:
        return _failed(error)
    _say(summary(folder, read_plan(paths)))
    print(folder)
    return 0


def _quiet() -> None:
    """What libraries tell each other about names to come concerns nobody here; bars are for terminals."""
    warnings.simplefilter("ignore", FutureWarning)
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _failed(error: Exception) -> int:
    """Unfaithful and a full disk are sentences; anything else is a mistake of ours and keeps its traceback."""
    from safetensors import SafetensorError

    from hpcft.train.weights import Unfaithful

    if not isinstance(error, (Unfaithful, OSError, SafetensorError)):
        raise error
    _say(f"failed: {error}; nothing was published")
    return EXIT_FAILED


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
