"""The command as a person runs it: exit codes, stdout and stderr, the next thing to type, never a traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcft.cli.logs import follow_run
from hpcft.cli.main import ELSEWHERE, VERBS
from hpcft.launch import watch
from hpcft.launch.watch import RunStatus
from hpcft.plan.plan import Plan
from hpcft.run import lease
from hpcft.run.ledger import Ledger
from hpcft.run.paths import RunPaths
from tests.cli.rights import by_mode
from tests.plans import plan
from tests.words import LEAST, PROFILES, ROOT, SEED, STARTERS


def hpcft(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``hpcft`` with the words of ``line`` in ``folder``, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hpcft.cli.main", *shlex.split(line)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def refused(line: str, folder: Path) -> str:
    """What was said by a command that was refused: exit code 2, nothing on stdout, no traceback."""
    result = hpcft(line, folder)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(("Error: ", "Usage: "))
    return result.stderr


def test_init_plan_and_render_lead_from_one_to_the_next(tmp_path: Path) -> None:
    began = hpcft("init mine", tmp_path)
    assert (began.returncode, began.stdout) == (0, "mine/run.yaml\nmine/cluster.yaml\n")
    assert "hpcft plan mine/run.yaml" in began.stderr
    planned = hpcft("plan mine/run.yaml --nodes 1", tmp_path)
    assert planned.returncode == 0
    assert "local (mine/cluster.yaml)" in planned.stdout
    assert planned.stderr.strip() == "next: hpcft submit mine/run.yaml --nodes 1"
    rendered = hpcft("render mine/run.yaml --cluster loopback --time 20 -o job.sbatch", tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    assert "next: sbatch job.sbatch" in rendered.stderr
    assert hpcft("render mine/run.yaml --cluster loopback --time 20 --check job.sbatch", tmp_path).returncode == 0
    windows = tmp_path / "windows.sbatch"
    windows.write_bytes((tmp_path / "job.sbatch").read_bytes().replace(b"\n", b"\r\n"))
    checked = hpcft("render mine/run.yaml --cluster loopback --time 20 --check windows.sbatch", tmp_path)
    assert checked.returncode == 1
    assert "differs from what this run renders in its line ends alone" in checked.stderr
    differs = hpcft("render mine/run.yaml --cluster loopback --time 21 --diff job.sbatch", tmp_path)
    assert differs.returncode == 1
    assert "+#SBATCH --time=00:21:00" in differs.stdout


@pytest.mark.parametrize("name", ["run.yaml", "data.jsonl", "own.sh"])
def test_a_file_that_is_no_script_of_ours_is_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndataset: data.jsonl\n")
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "own.sh").write_text("#!/bin/bash\nhpcft submit run.yaml\n")
    before = (tmp_path / name).read_bytes()
    assert f"{name}: already there" in refused(f"render run.yaml --cluster loopback -o {name}", tmp_path)
    assert (tmp_path / name).read_bytes() == before


def test_a_script_that_was_rendered_is_rendered_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        assert hpcft(f"render {LEAST} --seed {seed} --cluster loopback -o job.sbatch", tmp_path).returncode == 0
    assert hpcft(f"render {LEAST} --seed 2 --cluster loopback --check job.sbatch", tmp_path).returncode == 0
    (tmp_path / "job.sbatch").write_text("")  # as mktemp makes it
    assert hpcft(f"render {LEAST} --cluster loopback -o job.sbatch", tmp_path).returncode == 0


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder with a run that is closed to us, and one that is not."""
    for run in ("theirs", "open"):
        (tmp_path / "runs" / run / "jobs").mkdir(parents=True)
        (tmp_path / "runs" / run / "plan.json").write_text(plan(name=run).to_json())
    (tmp_path / "runs/theirs").chmod(0)
    yield tmp_path
    (tmp_path / "runs/theirs").chmod(0o700)


def test_a_run_that_is_closed_to_us_hides_no_other_and_is_said_to_be_closed(shared: Path) -> None:
    listed = by_mode("list", shared)
    assert (listed.returncode, [line.split()[:2] for line in listed.stdout.splitlines()]) == (0, [["open", "new"]])
    for verb in ("status", "logs", "cancel"):
        closed = by_mode(f"{verb} theirs", shared)
        assert closed.returncode == 2
        assert "runs/theirs: the folder is closed to you" in closed.stderr
    meant = by_mode("status opne", shared)
    assert meant.returncode == 2
    assert "did you mean open?" in meant.stderr


def test_one_run_that_cannot_be_read_or_judged_hides_no_other(tmp_path: Path) -> None:
    for name in ("good", "newer", "elsewhere"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "plan.json").write_text(plan(name=name).to_json())
    (tmp_path / "runs/newer/plan.json").write_text('{"schema": 999}')
    paths = RunPaths(tmp_path / "runs/elsewhere")
    environ = {"HPCFT_JOB": "local-other-7"}
    lease.take(paths, environ)
    paths.lease.write_text(paths.lease.read_text().replace(os.uname().nodename, "other"))
    Ledger(paths, "batch", environ).write("accepted")
    listed = hpcft("list", tmp_path)
    assert listed.returncode == 0, listed.stderr
    found = {line.split()[0]: line for line in listed.stdout.splitlines()}
    assert set(found) == {"good", "newer", "elsewhere"}
    assert "on other, which cannot be looked at from here" in found["elsewhere"]
    assert "does not read a Plan of schema 999" in hpcft("status newer", tmp_path).stdout
    assert "on other, which cannot be looked at from here" in refused("cancel elsewhere", tmp_path)


def test_what_a_rank_said_cannot_move_the_readers_cursor_or_add_a_line(tmp_path: Path) -> None:
    paths, environ = RunPaths(tmp_path / "runs/bad"), {"HPCFT_JOB": "local-n-7", "HPCFT_ATTEMPT": "1"}
    ledger = Ledger(paths, "batch", environ)
    ledger.write("attempt_began", nodes=["n1"])
    why = "rank 0 failed: \x1b[2J\a\nrun         bad: finished"
    ledger.write("attempt_ended", decision="stop", ending="failed", why=why)
    paths.plan.write_text(plan(name="bad").to_json())
    status = hpcft("status bad", tmp_path)
    assert status.returncode == 0
    assert "rank 0 failed: \\x1b[2J\\x07\\nrun         bad" in status.stdout
    assert not set(status.stdout) & {"\x1b", "\a"}
    assert sum(line.startswith("run ") for line in status.stdout.splitlines()) == 1


def test_a_log_is_followed_while_nobody_can_say_how_the_run_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = RunPaths(tmp_path / "runs/tiny")
    paths.attempt(1).mkdir(parents=True)
    paths.rank_log(1, 0).write_text("before\n")
    states = ["unknown", "running", "stopped", "stopped"]

    def asked(folder: Path) -> RunStatus:
        with paths.rank_log(1, 0).open("a") as log:
            log.write(f"while {states[0]}\n")
        return RunStatus("tiny", folder, states.pop(0), "7", "slurm", 0, None, None, (), "")

    monkeypatch.setattr(watch, "status", asked)
    follow_run(paths.root, every=0.2)
    assert capsys.readouterr().out.split("\n")[1:5] == ["before", "while unknown", "while running", "while stopped"]


def test_init_overwrites_nothing_and_says_what_is_there(tmp_path: Path) -> None:
    assert hpcft("init", tmp_path).returncode == 0
    before = (tmp_path / "run.yaml").read_bytes()
    assert "run.yaml, cluster.yaml: already there" in refused("init", tmp_path)
    assert (tmp_path / "run.yaml").read_bytes() == before


@pytest.mark.parametrize("run", STARTERS)
@pytest.mark.parametrize("cluster", PROFILES)
def test_the_command_that_init_names_next_works(run: str, cluster: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from hpcft.cli.main import command

    begun = CliRunner().invoke(command, ["init", "--run", run, "--cluster", cluster, str(tmp_path / "new")])
    assert begun.exit_code == 0, begun.output
    planned = CliRunner().invoke(command, ["plan", str(tmp_path / "new" / "run.yaml")])
    assert planned.exit_code == 0, planned.output


def test_init_gives_the_profile_that_is_asked_for_later_and_leaves_the_run(tmp_path: Path) -> None:
    assert hpcft("init --run tiny", tmp_path).returncode == 0
    before = (tmp_path / "run.yaml").read_bytes()
    later = hpcft("init --cluster infiniband-h100", tmp_path)
    assert (later.returncode, later.stdout) == (0, "cluster.yaml\n"), later.stderr
    assert "run.yaml: already there, left as it is" in later.stderr
    assert (tmp_path / "run.yaml").read_bytes() == before
    assert "infiniband-h100 (cluster.yaml)" in hpcft("plan run.yaml", tmp_path).stdout


def test_init_never_replaces_what_a_person_has_changed(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("name: mine\nscheduler: none\naccelerator: cpu\ncores_per_node: 2\n")
    assert "cluster.yaml: already there" in refused("init --cluster loopback", tmp_path)
    assert not (tmp_path / "run.yaml").exists()
    assert hpcft("init", tmp_path).stdout == "run.yaml\n"
    assert "mine (cluster.yaml)" in hpcft("plan run.yaml", tmp_path).stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("init --run lorra", "did you mean lora?"),
        ("init --cluster nosuch", "infiniband-h100"),
        ("init /proc/nowhere", "cannot be written"),
        ("init a-file/inner", "cannot be written"),
    ],
)
def test_init_refuses_what_it_cannot_do(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a-file").write_text("")
    assert said in refused(line, tmp_path)


def test_init_lists_every_key_on_stdout(tmp_path: Path) -> None:
    result = hpcft("init --list", tmp_path)
    assert result.returncode == 0
    assert "learning_rate:" in result.stdout
    assert not list(tmp_path.iterdir())


def test_init_writes_schemas_that_the_files_point_at(tmp_path: Path) -> None:
    assert hpcft("init --schema", tmp_path).returncode == 0
    for name in ("run", "cluster"):
        first = (tmp_path / f"{name}.yaml").read_text().splitlines()[0]
        assert first == f"# yaml-language-server: $schema={name}.schema.json"
        assert json.loads((tmp_path / f"{name}.schema.json").read_text())["properties"]
    assert hpcft("plan run.yaml", tmp_path).returncode == 0


def test_the_seeds_command_line_plans_verbatim_and_its_json_is_the_plan(tmp_path: Path) -> None:
    seed = SEED.replace("\n", " ")
    page = hpcft(f"plan {seed}", tmp_path)
    assert page.returncode == 0, page.stderr
    assert "1 window × 8 accumulation × 2 ranks = 16 windows" in page.stdout
    made = Plan.from_json(hpcft(f"plan {seed} --json", tmp_path).stdout)
    assert made.fingerprint in page.stdout
    assert made.batch.global_windows == 16


def test_all_shows_every_key_and_where_its_value_is_from(tmp_path: Path) -> None:
    page = hpcft(f"plan {LEAST} --lr 1e-3 --all", tmp_path).stdout
    assert any(line.split() == ["weight_decay", "0.1", "default"] for line in page.splitlines())
    assert any(line.split() == ["learning_rate", "0.001", "command", "line"] for line in page.splitlines())


def test_words_without_effect_are_said_on_stderr_once(tmp_path: Path) -> None:
    result = hpcft(f"plan {LEAST} --node_rank 0 --master_port 29500", tmp_path)
    assert result.returncode == 0
    assert result.stderr.count("has no effect here") == 2
    assert "no effect" not in result.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan", "model: missing"),
        ("plan nofile.yaml", "nofile.yaml: cannot be read: No such file or directory"),
        ("plan --modl m --dataset a", "did you mean model?"),
        (f"plan {LEAST} --lr", "lr: needs a value"),
        (f"plan {LEAST} --nodes 3", "this machine is one node"),
        (f"plan {LEAST} --cluster nosuch", "cluster: no such profile"),
        (f"plan {LEAST} --name 'a\nb'", "may not stand here"),
        (f"plan {LEAST} --cluster infiniband-h100 --partition x", "valid: cpu, gpu, scavenge"),
        (f"plan {LEAST} --cluster infiniband-h100 --global_batch_size 9", "valid: 8, 16"),
        (f"plan {LEAST} --pp 2", "not in this release"),
        ("plan --model m --dataset 'a#20#' --cluster local", "hint: write a#500"),
        (f"render {LEAST} -o /proc/nowhere/x", "cannot be written"),
        (f"render {LEAST} --check nofile", "cannot be read"),
        ("pln", "did you mean plan?"),
        ("--zzz", "No such option"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(tmp_path: Path, line: str, said: str) -> None:
    assert said in refused(line, tmp_path)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("chat.jsonl", "did you mean chats.jsonl?"),
        ("chats.json", "did you mean chats.jsonl?"),
        ("pack.csv", "did you mean packed.csv.gz?"),
        ("other.jsonl", "paths are relative to the folder"),
        ("notes.jsonl", "paths are relative to the folder"),
        ("nowhere/chats.jsonl", "paths are relative to the folder"),
    ],
)
def test_a_missing_data_file_is_told_the_one_like_it_that_can_be_read(asked: str, hint: str, tmp_path: Path) -> None:
    for name in ("chats.jsonl", "packed.csv.gz", "notes.md", "other.py"):
        (tmp_path / name).write_text("")
    message = refused(f"prepare --model m --dataset {asked} --cluster local", tmp_path)
    told = message[message.index("dataset: no such file") :]
    assert hint in told


@pytest.mark.parametrize("verb", ["prepare", "inspect", "submit"])
def test_a_hub_name_that_cannot_be_had_is_told_with_its_place(verb: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: own/er\n")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = hpcft(f"{verb} run.yaml --dataset own/data --cluster local", tmp_path, **offline)
    assert said.returncode == 2
    assert "Error: run.yaml:1: model own/er cannot be had" in said.stderr
    assert "Error: command line: dataset own/data cannot be had" in said.stderr


def test_a_missing_chat_template_is_told_with_its_place_and_the_one_like_it(tmp_path: Path) -> None:
    for name in ("config.json", "a.jsonl", "chats.jinja"):
        (tmp_path / name).write_text("{}")
    line = "--model . --dataset a.jsonl --cluster local --chat_template chat.jinja"
    for verb in ("prepare", "submit"):
        told = refused(f"{verb} {line}", tmp_path)
        assert "Error: command line: chat_template: no such file" in told
        assert "did you mean chats.jinja?" in told


def test_inspecting_what_is_not_prepared_names_the_command_that_prepares_it(tmp_path: Path) -> None:
    for name in ("config.json", "a.jsonl"):
        (tmp_path / name).write_text("{}")
    told = refused("inspect --model . --dataset a.jsonl --cluster local --max_length 64", tmp_path)
    assert "the data of this run is not prepared" in told
    assert "hint: hpcft prepare --model . --dataset a.jsonl --cluster local --max_length 64" in told


def test_a_small_batch_of_kto_is_noted_where_its_middle_would_be_a_guess(tmp_path: Path) -> None:
    for line, told in (("", ""), ("--global_batch_size 4", "which may hold few answers"),
                       ("--global_batch_size 4 --packing false", "a poor estimate from 4 answers")):  # fmt: skip
        result = hpcft(f"plan {LEAST} --task kto {line}", tmp_path)
        assert result.returncode == 0
        assert ("note: kto: " in result.stderr, told in result.stderr) == (bool(told), True)
    assert "note: kto" not in hpcft(f"plan {LEAST} --task dpo --global_batch_size 4", tmp_path).stderr


def test_windows_longer_than_what_the_model_was_made_for_are_noted(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    config = json.dumps({**QWEN2, **shape, "max_position_embeddings": 4096})
    (tmp_path / "m/config.json").write_text(config)
    for length, noted in ((4096, False), (8192, True)):
        words = f"--model m --from_scratch true --tuner_type full --dataset a.jsonl --max_length {length}"
        result = hpcft(f"plan {words} --cluster local", tmp_path)
        assert result.returncode == 0
        assert ("note: max_length: 8,192 is more than the 4,096 tokens" in result.stderr) == noted


def test_bytes_that_are_no_text_are_refused_and_no_traceback_follows(tmp_path: Path) -> None:
    for words in ([b"--name", b"\xff\xfe"], [b"--\xff", b"1"], [b"\xff.yaml"], [b"--system", b"\xff"]):
        result = subprocess.run(
            [sys.executable, "-m", "hpcft.cli.main", "plan", *LEAST.split(), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )
        assert result.returncode == 2, words
        assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("word", ELSEWHERE)
def test_a_verb_of_another_tool_is_told_what_it_is_called_here(word: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from hpcft.cli.main import command

    result = CliRunner().invoke(command, [word])
    assert result.exit_code == 2
    assert f"here it is: hpcft {ELSEWHERE[word]}" in result.output
    verb = ELSEWHERE[word].split()[0]
    assert verb in VERBS or verb == "--help"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_says_what_it_does(verb: str) -> None:
    from click.testing import CliRunner

    from hpcft.cli.main import command

    result = CliRunner().invoke(command, [verb, "--help"], prog_name="hpcft")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: hpcft {verb}")
    assert len(result.output.splitlines()) > 4


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    hpcft_ = f"{shlex.quote(sys.executable)} -m hpcft.cli.main"
    result = subprocess.run(
        ["bash", "-c", f"{hpcft_} init --list | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
    assert result.returncode == 0


def test_nothing_is_coloured_and_a_closed_stdin_does_no_harm(tmp_path: Path) -> None:
    result = hpcft(f"plan {LEAST}", tmp_path, FORCE_COLOR="1", TERM="dumb", LC_ALL="C")
    assert result.returncode == 0
    assert "\x1b" not in result.stdout + result.stderr


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        (QWEN2, "", "run.yaml:1: model: no weights are there"),
        (QWEN2, "--target_modules q_proj,bar", "command line: tuner.target_modules: the model has no such module"),
        (
            {**QWEN2, "quantization_config": {"quant_method": "gptq"}},
            "",
            "run.yaml:1: model: its weights were quantised",
        ),
        ({"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}, "", "no decoder of text"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "submit", "submit --dry-run"])
def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_prepared(
    tmp_path: Path, verb: str, config: dict[str, object], words: str, said: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "run.yaml").write_text("model: ./model\ndata: {dataset: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert said in refused(f"{verb} run.yaml {words}", tmp_path)
    assert not (tmp_path / "prepared").exists()


def test_a_model_that_is_elsewhere_can_be_planned_and_one_from_scratch_needs_no_weights(tmp_path: Path) -> None:
    assert hpcft(f"plan {LEAST}", tmp_path).returncode == 0
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(QWEN2))
    assert hpcft(f"plan {LEAST} --from_scratch true", tmp_path).returncode == 0
    assert hpcft(f"render {LEAST} --cluster loopback -o x.sh", tmp_path).returncode == 0
