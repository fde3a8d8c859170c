"""Checkpoints: written beside, verified by a manifest, published by one rename; read whole or not at all.

The order is the protocol: a snapshot on the host → temporary folder → every rank's files, flushed and fsynced → a
barrier that carries success → manifest → fence → rename → pointers → retention. A crash between any two of them leaves
the checkpoint before intact. After the snapshot nothing needs the device or the loop: ``publish`` may run in a thread,
and its messages go through a group of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file

from hpcft import disk
from hpcft.errors import refuse
from hpcft.plan.plan import Plan
from hpcft.run import manifest as manifests
from hpcft.run.lease import free_or_mine
from hpcft.run.ledger import attempt_of, job_of, read_events
from hpcft.run.manifest import Broken, Manifest, Piece, Stamp, Tensor
from hpcft.run.paths import RunPaths
from hpcft.slurm.environment import restart_count
from hpcft.train.facts import check_facts, facts, same_tensors
from hpcft.train.progress import Progress
from hpcft.train.protocols import Sharded
from hpcft.train.reader import Reader
from hpcft.train.snapshot import Host, Snapshot, bundles
from hpcft.train.software import software
from hpcft.train.world import World

FILE_NUMBERS = 2**30  # float32, 4 GiB; a rank's state is in as many files as that makes
WRITERS = 4  # of them written, and read again for their checksums, at a time: one core hashes 1 to 2 GB/s
TEMPORARY, OLD, TRASH = ".tmp-", ".old-", ".trash-"


class SaveFailed(Exception):
    """A save that was given up on all ranks; the checkpoint before it is intact."""


class FencedOff(Exception):
    """Another incarnation of this job holds the run: this one must not write into it, and ends."""


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run, as its ranks write them. data: the content key of the prepared shards.

    world: with a group for control that nobody else uses (``World.apart``).
    """

    paths: RunPaths
    plan: Plan
    data: str
    world: World
    environ: Mapping[str, str]
    host: Host = field(default_factory=Host)

    @property
    def incarnation(self) -> str:
        """Tells this attempt's temporaries from those of any other."""
        return f"{job_of(self.environ) or 'local'}-{restart_count(self.environ)}-{attempt_of(self.environ)}"

    def take(self, sharded: Sharded, progress: Progress) -> Snapshot:
        """The state after ``progress.step``, copied to the host. Good until the next one is taken."""
        return self.host.take(sharded, progress)

    def publish(self, snapshot: Snapshot) -> Path:
        """Write a snapshot and make it a checkpoint. Called by all ranks; the same end on all of them.

        Raises SaveFailed naming the ranks that could not write, FencedOff where the lease is no longer ours.
        """
        step = snapshot.step
        temporary = self.paths.checkpoints / f"{TEMPORARY}step-{step}.{self.incarnation}"
        target = self.paths.checkpoint(step)
        try:
            self._all_or_none("no folder", lambda: self._fresh(temporary) if self.world.first else None)
            reports = self._all_or_none("not written", lambda: self._write_mine(snapshot, temporary))
        except SaveFailed:
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        outcome = ""
        if self.world.first:
            outcome = self._publish(reports, snapshot, temporary, target)
        outcome = self.world.broadcast_text(outcome)
        if outcome == "fenced":
            raise FencedOff(f"the lease of {self.paths.root} is in other hands; nothing was published")
        if outcome:
            raise SaveFailed(outcome)
        return target

    def _all_or_none(self, what: str, work: Any) -> list[Any]:
        """Run ``work`` on this rank and hear of all: a list of what each returned. Raises SaveFailed on all or none."""
        try:
            report = {"done": work()}
        except (OSError, RuntimeError, Broken, safetensors.SafetensorError) as error:
            report = {"error": f"{type(error).__name__}: {error}"}
        reports = [json.loads(text) for text in self.world.gather_text(json.dumps(report))]
        if errors := [f"rank {rank} {r['error']}" for rank, r in enumerate(reports) if "error" in r]:
            raise SaveFailed(f"{what}: {'; '.join(errors)}; {_free(self.paths.root)}")
        return [report["done"] for report in reports]

    def _fresh(self, temporary: Path) -> None:
        _private(self.paths.checkpoints)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)

    def _write_mine(self, snapshot: Snapshot, temporary: Path) -> dict[str, Any]:
        """This rank's files, some written at a time; sizes, checksums, and what they hold."""
        bundled = bundles(snapshot.held, lambda held: held.length, FILE_NUMBERS) or [[]]
        parts = {_name(self.world.rank, n): held for n, held in enumerate(bundled)}

        def write(name: str) -> tuple[int, str]:
            path = temporary / name
            save_file({h.key: snapshot.tensors[h.key] for h in parts[name]}, path)
            path.chmod(0o600)
            disk.sync(path)
            return path.stat().st_size, manifests.checksum(path)

        with ThreadPoolExecutor(WRITERS) as pool:
            stamps = list(pool.map(write, parts))
        pieces = [
            {
                "name": h.name,
                "shape": h.shape,
                "piece": asdict(Piece(h.part, name, h.key, h.offset, h.length, h.region)),
            }
            for name, held in parts.items()
            for h in held
        ]
        return {"files": dict(zip(parts, stamps, strict=True)), "pieces": pieces}

    def _publish(self, reports: list[Any], snapshot: Snapshot, temporary: Path, target: Path) -> str:
        """Rank 0 alone: manifest, fence, rename, pointers, retention. Returns what went wrong, "" when nothing did."""
        try:
            manifest = self._manifest(reports, snapshot)
            disk.write(temporary / manifests.FILE, manifest.to_text())
            disk.sync(temporary)
            manifests.verify(temporary, deep=False)
            if not self._mine():
                shutil.rmtree(temporary, ignore_errors=True)
                return "fenced"
            self._replace(temporary, target)
            with suppress(OSError):  # a hint; the checkpoint is there, and readers find it without
                point(self.paths.latest, target)
            if snapshot.best:
                point(self.paths.best, target)
        except (OSError, Broken) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return f"not published: {type(error).__name__}: {error}; {_free(self.paths.root)}"
        with suppress(OSError):
            self._retain()
        return ""

    def _mine(self) -> bool:
        return free_or_mine(self.paths, self.environ)

    def _replace(self, temporary: Path, target: Path) -> None:
        """One rename; an older folder of the same step steps aside first and comes back if the rename fails."""
        aside = target.with_name(f"{OLD}{target.name}.{self.incarnation}")
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            if aside.exists():
                os.rename(aside, target)
            raise
        disk.sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def _manifest(self, reports: list[Any], snapshot: Snapshot) -> Manifest:
        shapes: dict[str, tuple[int, ...]] = {}
        pieces: dict[str, list[Piece]] = {}
        for report in reports:
            for entry in report["pieces"]:
                shapes[entry["name"]] = tuple(entry["shape"])
                pieces.setdefault(entry["name"], []).append(Piece.from_dict(entry["piece"]))
        return Manifest(
            step=snapshot.step,
            plan=self.plan.fingerprint,
            facts=facts(self.plan),
            data=self.data,
            progress=snapshot.progress,
            state=snapshot.state,
            layout=asdict(self.plan.layout),
            versions=software(),
            tensors={name: Tensor(shapes[name], tuple(pieces[name])) for name in shapes},
            files={name: Stamp(*stamp) for report in reports for name, stamp in report["files"].items()},
        )

    def _retain(self) -> None:
        """Keep the newest ``keep`` whole checkpoints and the best one; the last whole one is always among them."""
        best = manifests.pointed(self.paths.best)
        whole = [manifest.folder for manifest in manifests.verified(self.paths, deep=False)]
        for folder in whole[max(1, self.plan.checkpoint.keep) :]:
            if folder != best:
                os.rename(folder, folder.with_name(f"{TRASH}{folder.name}.{self.incarnation}"))
        self._sweep(TRASH)

    def _sweep(self, prefix: str) -> None:
        for path in self.paths.checkpoints.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

    def tidy(self) -> None:
        """At the start, rank 0: bring back what a crash left aside, remove what dead attempts left half done."""
        if not self.world.first or not self._mine():
            return
        for aside in self.paths.checkpoints.glob(f"{OLD}*"):
            target = aside.with_name(aside.name.removeprefix(OLD).split(".")[0])
            if not target.exists():
                os.rename(aside, target)
        for prefix in (OLD, TEMPORARY, TRASH):
            self._sweep(prefix)

    def choose(self) -> Manifest | None:
        """The checkpoint to resume from, the same on all ranks; rank 0 looks, the others are told.

        Raises Refusal where checkpoints were saved but none is there and whole, or its facts differ from the plan's.
        """
        answer = json.loads(self.world.broadcast_text(json.dumps(self._look()) if self.world.first else ""))
        if "asked" in answer:
            raise refuse(
                f"resume_from_checkpoint: no checkpoint is there that is whole: {answer['broken']}",
                value=answer["asked"],
                hint="a folder like runs/NAME/checkpoints/step-000400; auto: the newest of this run; none: start anew",
            )
        if "broken" in answer:
            raise refuse(
                f"no checkpoint of this run is whole: {answer['broken']}",
                where=str(self.paths.checkpoints),
                hint="restore the folder from a copy, or begin again under another name",
            )
        if not answer["folder"]:
            return None
        manifest = manifests.read(Path(answer["folder"]))
        check_facts(manifest, self.plan, self.data)
        return manifest

    def _look(self) -> dict[str, str]:
        wanted = self.plan.checkpoint.resume
        if wanted == "none" and attempt_of(self.environ) <= 1:
            return {"folder": ""}
        broken: list[Broken] = []
        found = manifests.newest_verified(self.paths, on_broken=broken.append)
        for one in broken:
            print(f"checkpoint passed over: {one}", file=sys.stderr, flush=True)
        if found is None and not broken and (step := self._last_saved()):
            broken.append(Broken(self.paths.checkpoint(step), "saved by an earlier attempt, and not there"))
        try:
            if found is None and not broken and wanted not in ("auto", "none"):
                found = manifests.verify(Path(wanted))
        except Broken as one:
            return {"broken": str(one), "asked": wanted}
        if found is None and broken:
            return {"broken": str(broken[0])}
        return {"folder": str(found.folder.absolute()) if found else ""}

    def _last_saved(self) -> int:
        """The newest step that the ledger knows to be published; 0 when there is none."""
        return max((event["step"] for event in read_events(self.paths) if event["event"] == "saved"), default=0)

    def load(self, manifest: Manifest, sharded: Sharded) -> Progress:
        """Fill ``sharded`` from a checkpoint; where the run stood then."""
        same_tensors(manifest, sharded.skeleton.trained)
        with Reader(manifest.folder, manifest) as reader:
            sharded.load(reader.read, manifest.state["updates"])
        sharded.scale.value = manifest.state["loss_scale"]
        sharded.scale.good_steps = manifest.state["good_steps"]
        return Progress.from_json(manifest.progress)


def _name(rank: int, part: int) -> str:
    return f"state-rank-{rank:04d}{f'-{part:02d}' if part else ''}.safetensors"


def point(pointer: Path, folder: Path) -> None:
    """Let ``latest`` or ``best`` name ``folder``; replaced whole, so that a reader never sees half a name."""
    disk.replace(pointer, folder.name + "\n")


def _private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _free(folder: Path) -> str:
    with suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free in {folder}"
    return f"{folder} cannot be looked at"
