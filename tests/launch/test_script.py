"""The batch shell by itself: the script under plain bash, with stand-ins for srun and for Python."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hpcft.launch.render import render
from hpcft.slurm.nodes import expand_hostlist
from tests.plans import plan

UNTIL_TOLD = "touch running; until [ -e told ]; do sleep 0.05; done"


class Shell:
    """The rendered script in ``folder``; ``python`` and ``srun`` write what they were asked to ``calls``."""

    def __init__(self, folder: Path, python: str = "", srun: str = "", **resources: Any) -> None:
        self.folder, self.script, self.calls = folder, folder / "job.sbatch", folder / "calls"
        self.script.write_text(render(plan(resources=resources)))
        (folder / "bin").mkdir()
        # Helpers succeed unless told otherwise; `begin` prints its line, `after` ends the loop.
        self._program(
            "python",
            'echo "python $*" >> calls\ncase "$*" in\n'
            + python
            + "*launch.accept) cat > plan.json ;;\n"
            + f'*launch.begin) echo "1 10.0.0.1 12345 {folder}/lo gs" ;;\n'
            + "*launch.after*) exit 0 ;;\nesac",
        )
        self._program("srun", 'echo "srun $*" >> calls\ncase "$*" in\n' + srun + "esac")
        (folder / "lo gs").mkdir()

    def _program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o700)

    def start(self, **environ: str) -> subprocess.Popen[str]:
        variables = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            **{"SLURM_SUBMIT_DIR": str(self.folder), "SLURM_JOB_ID": "7"},
            **{"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1"},
            **environ,
        }
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", self.script], env=variables, stdout=pipe, stderr=pipe, text=True, cwd=self.folder
        )

    def run(self, **environ: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**environ)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def called(self) -> list[str]:
        """The helpers and job steps in order, by their module's last word, with the exit code that `after` got."""
        found = re.findall(
            r"^(python|srun) .*?(?:launch|train)\.(\w+)(?: (?:--compare )?(\d+))?$", self.calls.read_text(), re.M
        )
        return [
            f"{'srun ' if program == 'srun' else ''}{module}{f' {code}' if code else ''}"
            for program, module, code in found
        ]


def test_the_flow_of_a_good_run(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    done = shell.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert shell.called() == ["accept", "begin", "srun preflight", "preflight 0", "srun main", "after 0"]
    assert (tmp_path / "plan.json").read_text() == plan().to_json()
    steps = [line for line in shell.calls.read_text().splitlines() if line.startswith("srun")]
    assert all("--wait=60" in step and "--cpus-per-task=1" in step for step in steps)
    assert ["--kill-on-bad-exit=1" in step for step in steps] == [False, True]
    assert f"--output={tmp_path}/lo gs/rank-%4t.log" in steps[1]


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (2, 2), (3, 0), (1, 1), (4, 1), (127, 1)])
def test_what_accept_says_is_what_happens(tmp_path: Path, code: int, ends: int) -> None:
    shell = Shell(tmp_path, python=f"*launch.accept) exit {code} ;;\n")
    done = shell.run()
    assert done.returncode == ends
    assert ("begin" in shell.called()) == (code == 0)
    assert ("cannot run hpcft" in done.stderr) == (code in (1, 127))


@pytest.mark.parametrize(
    ("restarts", "state", "excluded", "wanted", "nodes", "comes_back"),
    [
        ("1", "RUNNING", "(null)", "(null)", 12, "n1"),
        ("1", "RUNNING", "n[2-8]", "(null)", 12, "n1,n[2-8]"),
        ("1", "RUNNING", "n[2-9]", "(null)", 12, ""),  # enough nodes: it is not the nodes
        ("1", "RUNNING", "n2", "(null)", 3, "n1,n2"),
        ("1", "RUNNING", "n2", "(null)", 2, ""),  # none would be left
        ("1", "RUNNING", "(null)", "n1", 12, ""),
        ("1", "COMPLETING", "(null)", "(null)", 12, ""),  # cancelled meanwhile
        ("0", "RUNNING", "(null)", "(null)", 12, ""),
    ],
)
@pytest.mark.parametrize("lost", ["python", "folder"])
def test_a_job_that_ran_elsewhere_goes_back_into_the_queue_without_the_node_that_cannot_start_it(
    tmp_path: Path, restarts: str, state: str, excluded: str, wanted: str, nodes: int, comes_back: str, lost: str
) -> None:
    shell = Shell(tmp_path, python="*launch.accept) exit 127 ;;\n")
    names = " ".join(expand_hostlist(f"n1,{excluded.removeprefix('(null)')}"))
    shell._program(
        "scontrol",
        f'echo "scontrol $*" >> {tmp_path}/calls\ncase "$*" in\n'
        f"*show\\ job*) echo JobId=7 JobState={state} Restarts={restarts} "
        f"'ReqNodeList={wanted} ExcNodeList={excluded}' x ;;\n"
        f"*hostnames*) printf '%s\\n' {names} ;;\nesac",
    )
    shell._program("sinfo", f"printf 'n%s\\n' {' '.join(map(str, range(1, nodes + 1)))}")
    folder = {"SLURM_SUBMIT_DIR": "/no/such/folder"} if lost == "folder" else {}
    of_the_job = {"SLURMD_NODENAME": "n1", "SLURM_JOB_PARTITION": "p", "SLURM_JOB_NUM_NODES": "1"}
    assert shell.run(SLURM_RESTART_COUNT=restarts, **of_the_job, **folder).returncode == 1
    asked = [line for line in shell.calls.read_text().splitlines() if re.match("scontrol (requ|upd|rel)", line)]
    update = f"scontrol update JobId=7 ExcNodeList={comes_back}"
    assert asked == (["scontrol requeuehold 7", update, "scontrol release 7"] if comes_back else [])


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (20, 0), (30, 1), (1, 1), (2, 1)])
def test_what_after_says_is_what_happens(tmp_path: Path, code: int, ends: int) -> None:
    assert Shell(tmp_path, python=f"*launch.after*) exit {code} ;;\n").run().returncode == ends


def test_a_new_job_step_when_after_wants_one(tmp_path: Path) -> None:
    once = "*launch.after*) [ -e once ] && exit 0; touch once; exit 10 ;;\n"
    shell = Shell(tmp_path, python=once)
    shell.run()
    assert shell.called().count("srun main") == 2
    assert shell.called().count("accept") == 1


@pytest.mark.parametrize(
    "line", ["set -euo pipefail", "source site.sh", "trap 'exit 9' ERR", "set -E; trap 'exit 9' ERR"]
)
def test_a_setup_line_that_ends_scripts_at_their_first_failure_does_not_take_away_the_retries(
    tmp_path: Path, line: str
) -> None:
    (tmp_path / "site.sh").write_text("set -e\n")
    once = "*launch.after*) [ -e once ] && exit 0; touch once; exit 10 ;;\n"
    shell = Shell(tmp_path, python=once, srun="*train.main) [ -e once ] || exit 137 ;;\n", setup=(line,))
    assert shell.run().returncode == 0
    assert [call for call in shell.called() if call.startswith("after")] == ["after 137", "after 0"]


def test_a_setup_line_that_fails_under_set_e_is_the_end_and_its_clean_up_happens_at_the_end(tmp_path: Path) -> None:
    shell = Shell(tmp_path, setup=("trap 'touch cleaned' EXIT", "set -e", "false"))
    assert shell.run().returncode == 1
    assert (tmp_path / "cleaned").exists()
    assert not shell.calls.exists()


def test_data_prepared_in_the_job_is_a_job_step_of_one_task_with_the_cores_of_a_node(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"prepare": "in_job", "nodes": 2, "tasks_per_node": 4, "cpus_per_task": 3}
    shell = Shell(tmp_path, srun="*launch.prepare*) exit 5 ;;\n", **asked)
    shell.run()
    assert shell.called() == ["accept", "begin", "srun preflight", "preflight 0", "after 5"]
    (step,) = [line for line in shell.calls.read_text().splitlines() if "launch.prepare --in-job" in line]
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=12 " in step


def test_the_ranks_do_not_start_when_the_preflight_fails(tmp_path: Path) -> None:
    shell = Shell(tmp_path, python="*preflight*--compare*) exit 4 ;;\n")
    shell.run()
    assert shell.called()[2:] == ["srun preflight", "preflight 0", "after 4"]


@pytest.mark.parametrize("code", [0, 1, 75, 137, 143])
def test_the_true_exit_code_of_srun_survives_signals(tmp_path: Path, code: int) -> None:
    shell = Shell(tmp_path, srun=f"*train.main) {UNTIL_TOLD}; exit {code} ;;\n")
    process = shell.start()
    while not (tmp_path / "running").exists():
        time.sleep(0.02)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.03)
    (tmp_path / "told").touch()
    process.communicate(timeout=60)
    assert shell.called()[-1] == f"after {code}"


@pytest.mark.parametrize("helper", ["launch.begin", "launch.preflight --compare"])
def test_after_a_term_no_job_step_starts_before_after_was_asked(tmp_path: Path, helper: str) -> None:
    line = f'echo "1 a 1 {tmp_path}/lo gs"' if "begin" in helper else "exit 0"
    shell = Shell(tmp_path, python=f'*"{helper}"*) {UNTIL_TOLD}; {line} ;;\n')
    process = shell.start()
    while not (tmp_path / "running").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "told").touch()
    process.communicate(timeout=60)
    assert "srun main" not in shell.called()
    assert shell.called()[-1].startswith("after")


def test_an_allocation_other_than_planned_is_warned_about(tmp_path: Path) -> None:
    done = Shell(tmp_path).run(SLURM_JOB_NUM_NODES="3")
    assert done.stderr == "hpcft: warning: nodes: planned 1, allocated 3\n"


def test_setup_lines_see_the_modules_of_their_folder_and_the_helpers_do_not(tmp_path: Path) -> None:
    seen = 'echo "${PYTHONSAFEPATH-unset}" >> seen'
    Shell(tmp_path, python=f"*launch.accept) {seen} ;;\n", srun=f"*train.main) {seen} ;;\n", setup=(seen,)).run()
    assert (tmp_path / "seen").read_text() == "unset\n1\n1\n"


def test_a_run_folder_of_the_users_wins_and_spaces_are_harmless(tmp_path: Path) -> None:
    shell = Shell(tmp_path, python='*launch.begin) echo "1 a 1 $HPCFT_RUN"; mkdir "$HPCFT_RUN" ;;\n')
    shell.run(HPCFT_RUN=f"{tmp_path}/a b%c")
    assert f"--output={tmp_path}/a b%%c/rank-%4t.log" in shell.calls.read_text()


def test_what_an_outer_job_left_behind_is_not_seen(tmp_path: Path) -> None:
    """sbatch hands the numbers of an array's element on to the job that it submits, which would requeue that one."""
    names = ("HPCFT_ATTEMPT", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_ARRAY_TASK_ID")
    seen = " ".join(f"${{{name}-unset}}" for name in names)
    shell = Shell(tmp_path, python=f'*launch.accept) echo "{seen} $HPCFT_JOB" > seen ;;\n')
    shell.run(**dict.fromkeys(names, "9"), HPCFT_JOB="local-1")
    assert (tmp_path / "seen").read_text() == "unset unset unset unset 7\n"


@pytest.mark.parametrize(
    ("says", "restarts"), [("JobId=7 Requeue=1 Restarts=0 x", "0"), ("JobId=7 Restarts=12 x", "12"), ("", "3")]
)
def test_the_count_of_restarts_is_this_jobs_own_where_slurm_can_say(tmp_path: Path, says: str, restarts: str) -> None:
    """Slurm does not set it on a first start: a job that was submitted from a restarted one inherits that one's."""
    shell = Shell(tmp_path, python="*launch.after*) echo $SLURM_RESTART_COUNT > seen ;;\n")
    shell._program("scontrol", f'echo "$*" > asked\n[ "{says}" ] && echo "{says}"')
    shell.run(SLURM_RESTART_COUNT="3")
    assert (tmp_path / "seen").read_text() == f"{restarts}\n"
    assert (tmp_path / "asked").read_text() == "-o show job 7\n"


def test_a_job_that_was_never_restarted_does_not_ask_slurm_about_it(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell._program("scontrol", "touch asked")
    assert shell.run().returncode == 0
    assert not (tmp_path / "asked").exists()


def test_the_run_folder_of_the_hpcft_job_that_it_was_submitted_from_is_not_taken(tmp_path: Path) -> None:
    shell = Shell(tmp_path, python='*launch.accept) echo "$HPCFT_RUN" > seen ;;\n')
    shell.run(HPCFT_JOB="3", HPCFT_RUN="/runs/other")
    assert (tmp_path / "seen").read_text() == f"{tmp_path}/runs/tiny\n"


@pytest.mark.parametrize(("code", "ends"), [(2, 2), (1, 1), (143, 1)])
def test_without_an_attempt_the_script_ends(tmp_path: Path, code: int, ends: int) -> None:
    shell = Shell(tmp_path, python=f"*launch.begin) exit {code} ;;\n")
    assert shell.run().returncode == ends
    assert shell.called() == ["accept", "begin"]


def test_too_near_to_the_time_limit_no_job_step_starts_and_after_decides(tmp_path: Path) -> None:
    line = f'echo "1 a 1 {tmp_path}/lo gs"'
    shell = Shell(tmp_path, python=f"*launch.begin) {line}; exit 5 ;;\n*--compare*) exit 143 ;;\n")
    assert shell.run().returncode == 0
    assert shell.called() == ["accept", "begin", "preflight 143", "after 143"]


def test_the_place_of_a_rank_that_the_job_was_submitted_from_is_not_seen(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    shell = Shell(tmp_path, srun="*train.main) env > seen ;;\n")
    shell.run(**dict.fromkeys(names, "1"))
    seen = [line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()]
    assert "HPCFT_RUN" in seen
    assert not set(names) & set(seen)
