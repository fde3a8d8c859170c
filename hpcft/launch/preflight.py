"""Before the ranks: are all nodes fit, and alike? Seconds, no torch.

As job step 1 every node writes what it is into a small file under the attempt's logs; then, with ``--compare
CODE`` on the batch host, the files are compared. Exit code 0: fit. A fault of a node names that node, so that the
next attempt can do without it; a fault of the run (no prepared data, no model) is refused, since no node is to blame.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import hpcft
from hpcft import disk
from hpcft.catalog import STRATEGIES
from hpcft.errors import Problem, Refusal, refuse
from hpcft.launch.begin import allocated_nodes
from hpcft.launch.entry import run, say
from hpcft.launch.inputs import model_problems
from hpcft.plan.plan import Plan, data_key
from hpcft.run.folder import read_plan
from hpcft.run.ledger import Ledger, attempt_of
from hpcft.run.paths import STORE_VARIABLE, RunPaths

EXIT_BAD_NODE = 4
PACKAGES = ("torch", "transformers", "peft", "safetensors")
SEEN_WITHIN_SECONDS = 20  # how long a shared file system may take to show one node's file to another


@dataclass(frozen=True)
class Report:
    """What one node found. versions: package → version, Python included. faults: sentences about this node."""

    node: str
    versions: dict[str, str]
    gpus: int
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """faults: node → what is wrong with it. refused: what no other node would mend."""

    faults: dict[str, list[str]]
    refused: str = ""

    @property
    def fit(self) -> bool:
        return not self.faults and not self.refused


def inspect(plan: Plan, paths: RunPaths, environ: Mapping[str, str]) -> Report:
    """This node's report."""
    gpus = gpus_seen(environ) if plan.resources.accelerator != "cpu" else 0
    packages = (*PACKAGES, *needed(plan))
    return Report(own_name(environ), versions(packages), gpus, list(_faults(plan, paths, environ, gpus)))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of what must be the same everywhere; a missing package is ``missing``."""
    found = {"python": platform.python_version(), "hpcft": hpcft.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def gpus_seen(environ: Mapping[str, str]) -> int:
    """How many GPUs a rank on this node will see: what Slurm set aside, if it did, else all that the driver shows."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in environ:
            return min(len([device for device in environ[name].split(",") if device]), _gpus_of_machine())
    return _gpus_of_machine()


def _gpus_of_machine() -> int:
    for folder, pattern in (("/proc/driver/nvidia/gpus", "*"), ("/dev", "nvidia[0-9]*"), ("/dev/dri", "renderD*")):
        if found := len(list(Path(folder).glob(pattern))):
            return found
    return 0


def _faults(plan: Plan, paths: RunPaths, environ: Mapping[str, str], gpus: int) -> Iterator[str]:
    wanted = plan.resources.gpus_per_node
    if plan.resources.accelerator != "cpu" and gpus < wanted:
        yield f"sees {gpus} of {wanted} GPUs"
    if plan.resources.accelerator == "cuda" and (why := _driver_fault()):
        yield why
    if not _writable(paths.attempt(attempt_of(environ))):
        yield f"cannot write into the run folder {paths.root}"
    store = Path(environ.get(STORE_VARIABLE, plan.folders.store))
    if store.exists() and not os.access(store, os.R_OK | os.X_OK):
        yield f"cannot read the prepared data in {store}"


def _driver_fault() -> str:
    """nvidia-smi notices a GPU that has fallen off the bus; where it is not installed, nothing is said."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        return "nvidia-smi gave no answer in 30 s"
    return f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}" if done.returncode else ""


def _writable(folder: Path) -> bool:
    probe = folder / f".probe-{os.getpid()}-{platform.node()}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError:
        return False
    return True


def refuse_unprepared(plan: Plan, environ: Mapping[str, str]) -> None:
    """Raises Refusal where the run lacks what every node would lack: prepared shards, or the model's folder."""
    store = Path(environ.get(STORE_VARIABLE, plan.folders.store))
    if not os.path.isfile(store / "requests" / f"{data_key(plan.data)}.json"):  # nor is one that may not be read
        raise refuse(
            "the data of this run is not prepared",
            where=str(store),
            hint="on the login node: hpcft prepare RUN.yaml; then submit again",
        )
    refuse_no_model(plan)


def refuse_no_model(plan: Plan) -> None:
    """Raises Refusal where the folder that the run names as its model is none."""
    model = Path(plan.model.path)
    if plan.model.source == "local" and (problems := list(model_problems(plan, model, weights=True))):
        raise Refusal([dataclasses.replace(problem, where=str(model.absolute())) for problem in problems])


def needed(plan: Plan) -> dict[str, str]:
    """Package → what of the run wants it; packages that are not installed with hpcft."""
    found = {}
    if package := STRATEGIES[plan.train.strategy].needs:
        found[package] = f"strategy {plan.train.strategy}"
    if plan.model.quantization == "nf4":
        found["bitsandbytes"] = "a base quantised to nf4"
    # Where it is not here, transformers takes the kernels of a package of that name in its place.
    if plan.model.attention == "flash_attention_2" and importlib.util.find_spec("kernels") is None:
        found["flash_attn"] = "attn_impl: flash_attention_2 (auto needs nothing)"
    return found


def refuse_missing_packages(plan: Plan) -> None:
    """Raises Refusal, with what to type, for packages of the run that this Python does not find; imports none."""
    if problems := [
        Problem(f"{why} needs {package}, which is not installed", sys.executable, hint=f"pip install {package}")
        for package, why in needed(plan).items()
        if importlib.util.find_spec(package) is None
    ]:
        raise Refusal(problems)


def compare(reports: Sequence[Report], nodes: Sequence[str]) -> Verdict:
    """The batch host's judgement: silent nodes, nodes with faults, and nodes whose software is not the majority's."""
    faults: dict[str, list[str]] = {}
    told = {report.node: report for report in reports}
    for node in nodes:
        if node not in told:
            faults.setdefault(node, []).append("did not report")
    for report in reports:
        if report.faults:
            faults.setdefault(report.node, []).extend(report.faults)
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        usual, _ = Counter(report.versions.get(name, "missing") for report in reports).most_common(1)[0]
        for report in reports:
            if (found := report.versions.get(name, "missing")) != usual:
                faults.setdefault(report.node, []).append(f"has {name} {found}, the other nodes {usual}")
    return Verdict(faults, _nobody_fit(faults, nodes))


def _nobody_fit(faults: Mapping[str, list[str]], nodes: Sequence[str]) -> str:
    """Where all nodes have the same fault it is not theirs, and other nodes would not do better."""
    same = {tuple(found) for found in faults.values()}
    if len(faults) == len(nodes) and len(same) == 1 and len(nodes) > 1:
        return "every node: " + "; ".join(next(iter(same)))
    return ""


def own_name(environ: Mapping[str, str]) -> str:
    """Slurm's name of this node; several of its daemons may share a host's name."""
    return environ.get("SLURMD_NODENAME") or platform.node()


def report_file(paths: RunPaths, attempt: int, node: str) -> Path:
    return paths.attempt(attempt) / f"preflight-{node}.json"


def read_reports(paths: RunPaths, attempt: int, nodes: Sequence[str], seconds: float) -> list[Report]:
    """The nodes' reports; waits up to ``seconds`` for those that this host does not see yet."""
    end = time.monotonic() + seconds
    while True:
        files = [file for node in nodes if (file := report_file(paths, attempt, node)).is_file()]
        if len(files) == len(nodes) or time.monotonic() >= end:
            return [Report(**json.loads(file.read_text())) for file in files]
        time.sleep(0.2)


def judge(plan: Plan, paths: RunPaths, environ: Mapping[str, str], code: int) -> int:
    """``--compare``: the exit code for the batch script. What was found goes to ledger and log."""
    nodes, attempt = allocated_nodes(environ)[: plan.resources.nodes], attempt_of(environ)
    reports = read_reports(paths, attempt, nodes, 0 if code else SEEN_WITHIN_SECONDS)
    if code and not reports:  # a signal, or nothing could be started: not for us to judge
        say(f"preflight: no node reported (exit code {code}); see {paths.attempt(attempt)}")
        return code
    ledger = Ledger(paths, "batch", environ)
    try:
        if plan.resources.prepare == "in_job":  # the next job step prepares the data
            refuse_no_model(plan)
        else:
            refuse_unprepared(plan, environ)
        refuse_missing_packages(plan)
    except Refusal as refusal:
        ledger.write("preflight", ok=False, refused=str(refusal), bad_nodes=[])
        raise
    verdict = compare(reports, nodes)
    bad = [] if verdict.refused else sorted(verdict.faults)
    ledger.write("preflight", ok=verdict.fit, refused=verdict.refused, bad_nodes=bad, faults=verdict.faults)
    for node, faults in verdict.faults.items():
        say(f"preflight: {node} {'; '.join(faults)}")
    return 0 if verdict.fit else EXIT_BAD_NODE


def main() -> int:
    paths = RunPaths.from_environment()
    plan = read_plan(paths)
    if sys.argv[1:2] == ["--compare"]:
        return judge(plan, paths, os.environ, int(sys.argv[2]))
    report = inspect(plan, paths, os.environ)
    disk.replace(report_file(paths, attempt_of(os.environ), report.node), json.dumps(dataclasses.asdict(report)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
