"""The Plan as an sbatch script: a pure function; the same Plan gives the same bytes on every machine.

The template is code; the Plan is data and is never evaluated. A value reaches the script in one of four ways,
each a filter: ``word`` (allow-listed, for ``#SBATCH`` lines), ``quote`` (one shell word, nothing expands),
``expand`` (one shell word in which ${NAME} stands for a variable), ``comment`` (one line of a comment).
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2

from hpcft.clock import clock
from hpcft.errors import Problem, Refusal, printable, refuse
from hpcft.launch.array import Array
from hpcft.plan.plan import Plan, Resources, Variable
from hpcft.resources import templates
from hpcft.run.expand import REFERENCE

TERMINATOR = "HPCFT_PLAN"
MEMORY_REQUESTS = {  # each of which srun refuses beside another
    "--mem": "SLURM_MEM_PER_NODE",
    "--mem-per-cpu": "SLURM_MEM_PER_CPU",
    "--mem-per-gpu": "SLURM_MEM_PER_GPU",
}
TEMPLATE = "train.sbatch.j2"
ARRAY_TEMPLATE = "array.sbatch.j2"
PREPARE_TEMPLATE = "prepare.sbatch.j2"

# What sbatch takes literally on a directive line: no space, quote, backslash, $, #, or anything that ends a line.
_WORD = re.compile(r"[A-Za-z0-9._,:=@%+/&|*!()\[\]-]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*")
# Options that the template writes itself, or that would change what the script is.
RESERVED = {
    "job-name": "name",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "constraint": "slurm.constraint",
    "reservation": "slurm.reservation",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.nodes",
    "ntasks-per-node": "slurm.nodes",
    "cpus-per-task": "the profile's cores_per_node",
    "gres": "the profile's GPU request",
    "gpus": "the profile's GPU request",
    "gpus-per-node": "the profile's GPU request",
    "gpus-per-task": "the profile's GPU request; a task bound to one GPU loses the fast links to its peers",
    "mem": "slurm.mem",
    "exclusive": "slurm.exclusive",
    "time": "slurm.time",
    "signal": "the profile's signal_lead",
    "requeue": "nothing: a run always comes back",
    "no-requeue": "nothing: a run always comes back",
    "output": "the run folder: every rank has a log of its own there",
    "error": "the run folder: every rank has a log of its own there",
    "open-mode": "nothing: append is what keeps the log of earlier attempts",
    "array": "one submission per run",
    "export": "the profile's environment",
    "clusters": "SLURM_CLUSTERS, which squeue and scontrol follow too",
    "wrap": "nothing: the script is the job",
    "chdir": "nothing: the job runs where it was submitted",
    "parsable": "nothing: hpcft reads the job id itself",
    "kill-on-bad-exit": "nothing: always on",
}


def render(plan: Plan, template: Path | None = None) -> str:
    """The sbatch script of ``plan``, from ``template`` or the one that comes with hpcft.

    Raises Refusal where a value cannot stand in a script, or the template names something that does not exist.
    """
    _refuse_unfit(plan)
    return _rendered(_facts(plan), template, TEMPLATE)


def render_array(array: Array, template: Path | None = None) -> str:
    """The sbatch script of all runs of ``array``; raises as ``render`` does."""
    first, table = array.plans[0], "\n".join(array.rows)
    names = [_tried(_one_name, name) for name in (array.name, *(plan.name for plan in array.plans[1:]))]
    if problems := [*_unfit(first), *(p for refusal in (*names, _tried(_unicode, table)) for p in _problems(refusal))]:
        raise Refusal(problems)
    facts = _facts(first) | {
        "array": array,
        "job_name": array.name,
        "log": "%x-%A_%a.log",
        "runs_folder": _under_submit(first.folders.runs),
        "table": table,
    }
    return _rendered(facts, template, ARRAY_TEMPLATE)


def _rendered(facts: dict[str, Any], template: Path | None, ours: str) -> str:
    environment = _environment(template)
    name = template.name if template else ours
    try:
        text = environment.get_template(name).render(facts)
    except jinja2.TemplateSyntaxError as error:
        raise refuse(f"template: {error.message}", where=f"{error.filename or error.name}:{error.lineno}") from error
    except jinja2.TemplateNotFound as error:
        raise refuse(f"template: {error.name} is not there", where=str(template or ours)) from error
    except jinja2.UndefinedError as error:
        raise refuse(f"template: {error.message}", where=str(template or ours), choices=sorted(facts)) from error
    return text.rstrip("\n") + "\n"


def render_preparation(plan: Plan) -> str:
    """The script of the job that prepares the data of ``plan``. Raises Refusal where its cluster has no such job."""
    if plan.resources.prepare_job is None:
        raise refuse(
            "this cluster prepares data without a job of its own",
            where=f"cluster {plan.resources.cluster}",
            value=f"prepare: {plan.resources.prepare}",
            hint="prepare: job in the cluster profile",
        )
    return render(plan, templates() / PREPARE_TEMPLATE)


def _environment(template: Path | None) -> jinja2.Environment:
    """A user's template comes first and may include our parts; nothing of the Plan is ever taken for a template."""
    folders = [template.parent] if template else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, templates()]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(word=word, quote=shlex.quote, expand=expand, comment=comment, clock=clock, option=option)
    return environment


def _facts(plan: Plan) -> dict[str, Any]:
    """Everything a template may name; an array's has ``runs_folder`` and ``table`` too."""
    r = plan.resources
    return {
        "plan": plan,
        "array": None,
        "job_name": r.job_name,
        "log": "%x-%j.log",
        "resources": r,
        "job": r.prepare_job,
        "layout": plan.layout,
        "tasks_per_node": 1 if r.launcher == "torchrun" else r.tasks_per_node,
        "cpus_per_task": r.cpus_per_task * (r.tasks_per_node if r.launcher == "torchrun" else 1),
        "gpu_option": gpu_option(r),
        "others_memory": others_memory(r),
        "run_folder": _under_submit(plan.folders.runs, plan.name),
        "store_folder": _under_submit(plan.folders.store),
        "plan_json": plan.to_json(),
        "terminator": TERMINATOR,
    }


def gpu_option(resources: Resources) -> str | None:
    """How GPUs are asked for on this cluster, always per node; None for a CPU run or where sites count whole nodes."""
    count, kind = resources.gpus_per_node, resources.gpu_type
    if not count or resources.gpu_request == "none":
        return None
    typed = f"{kind}:{count}" if kind else str(count)
    forms = {"gres": f"gres=gpu:{count}", "gres_typed": f"gres=gpu:{typed}", "gpus_per_node": f"gpus-per-node={typed}"}
    if resources.gpu_request not in forms:
        raise refuse("gpu_request", value=resources.gpu_request, choices=[*forms, "none"])
    if resources.gpu_request == "gres_typed" and not kind:
        raise refuse(
            "gpu_request: gres_typed needs a GPU type", hint="set gpu_type in the profile to what `sinfo -o %G` shows"
        )
    return forms[resources.gpu_request]


def others_memory(resources: Resources) -> list[str]:
    """The variables of memory requests that another job may have left: all but that of this job's own request."""
    said = [option.partition("=")[0] for option in resources.extra] + (["--mem"] if resources.memory else [])
    return [variable for option, variable in MEMORY_REQUESTS.items() if option not in said]


def word(value: object) -> str:
    """A value for an ``#SBATCH`` line. Raises Refusal for anything that sbatch or a shell could read otherwise."""
    text = str(value)
    if not _WORD.fullmatch(text):
        raise refuse(
            "this value cannot stand on an #SBATCH line",
            value=printable(text),
            choices=["letters", "digits", "._,:=@%+/&|*!()[]-"],
            hint="a space or a line break there would be read as a further option, or run as a command",
        )
    return text


def option(text: str) -> str:
    """A further sbatch option of the user's, checked and not one of those the template writes."""
    flag, equals, value = text.partition("=")
    if not _OPTION.fullmatch(flag) or (equals and not _WORD.fullmatch(value)):
        raise refuse("extra: not an sbatch option", value=text, hint="write it as --name or --name=value")
    if (owner := RESERVED.get(flag[2:])) is not None:
        raise refuse(f"extra: {flag} is set by {owner}", value=text)
    return text


def expand(value: str) -> str:
    """One shell word in double quotes: ${NAME}, ${NAME:-default} and a leading $NAME are variables, all else is itself.

    Raises Refusal for control characters.
    """
    _one_line(value)
    pieces, last = [], 0
    for match in REFERENCE.finditer(value):
        pieces += [re.sub(r'([\\"$`])', r"\\\1", value[last : match.start()]), match[0]]
        last = match.end()
    pieces.append(re.sub(r'([\\"$`])', r"\\\1", value[last:]))
    return '"' + "".join(pieces) + '"'


def comment(value: object) -> str:
    """One line of a comment: whatever is in it cannot end the comment."""
    return printable(" ".join(str(value).split()), limit=400)


def _under_submit(folder: str, name: str = "") -> str:
    """A folder as one shell word; a relative one lies in the directory that the job was submitted from."""
    whole = f"{folder.rstrip('/') or '/'}/{name}" if name else folder
    return expand(whole if whole.startswith(("/", "$")) else "${SLURM_SUBMIT_DIR}/" + whole)


def _refuse_unfit(plan: Plan) -> None:
    """Raises Refusal with everything in the Plan that would not survive the way through a shell script."""
    if problems := _unfit(plan):
        raise Refusal(problems)


def _unfit(plan: Plan) -> list[Problem]:
    tried = (
        _tried(_one_name, plan.name),
        _tried(_plan_fits, plan),
        *(_tried(_variable, v) for v in plan.environment),
    )
    return [problem for refusal in tried for problem in _problems(refusal)]


def _problems(refusal: Refusal | None) -> list[Problem]:
    return list(refusal.problems) if refusal else []


def _tried(check: Any, value: Any) -> Refusal | None:
    try:
        check(value)
    except Refusal as refusal:
        return refusal
    return None


def _one_name(name: str) -> None:
    if not name or name in (".", "..") or "/" in name or not name.isprintable():
        raise refuse("name: a run's name is the name of a folder", value=name, hint="letters, digits, - and _")


def _one_line(value: str) -> None:
    if not value.isprintable():
        raise refuse("a line break or control character cannot stand in a script", value=printable(value))


def _variable(variable: Variable) -> None:
    if not _NAME.fullmatch(variable.name):
        raise refuse("environment: not a variable's name", value=variable.name)
    _one_line(variable.value)


def _plan_fits(plan: Plan) -> None:
    """The Plan's text must come out of the here-document as it went in."""
    text = plan.to_json()
    _unicode(text)
    if TERMINATOR in text.splitlines() or json.loads(text)["name"] != plan.name:
        raise refuse(f"the Plan holds the line {TERMINATOR}, which ends it inside the script")


def _unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(
            "the Plan holds a character that is not Unicode text", value=ascii(error.object[error.start])
        ) from error
