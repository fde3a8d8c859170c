"""What ``make demo`` runs: a model of random weights learns to sort letters, on two CPU ranks of this machine.

Everything that a person would type is typed here too: the training goes through ``hpcft submit``, the result comes
from ``hpcft export``, and transformers alone asks it. All files go to .demo/. Exit code 1 where a number is missed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import answers
import curve
import newborn
import task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".demo"
HPCFT = Path(sys.executable).with_name("hpcft")
RUN = "sorting"  # as run.yaml names it

TRAINED, HELD_OUT, SEED = 8000, 300, 7
# Asked at the end; their letters are in no record, in no order.
FRESH = (task.example("blacksmith", task.FORWARDS), task.example("wonderful", task.BACKWARDS))
BEFORE_AT_MOST, AFTER_AT_LEAST = 0.10, 0.90
LONGEST_SECONDS = 900


def main() -> None:
    """The demo from start to end."""
    began = time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
    clean()
    held_out = write_inputs()
    before = examine(*answers.newborn(FOLDER / "model", seed_of_the_run()), held_out, "before training")
    if before > BEFORE_AT_MOST:
        fail(f"random weights answered {before:.1%} of the questions; at most {BEFORE_AT_MOST:.0%} was expected")
    train()
    after = ask_the_exported(held_out)
    picture(before, after)
    if after < AFTER_AT_LEAST:
        fail(f"{after:.1%} of the held-out questions were answered; {AFTER_AT_LEAST:.0%} was to be reached")
    farewell(before, after, time.monotonic() - began)


def clean() -> None:
    """Start anew: what an earlier demo made is removed, other runs in .demo/ stay."""
    FOLDER.mkdir(exist_ok=True)
    ours = [FOLDER / name for name in ("model", "trained", "curve.png", f"runs/{RUN}")]
    there = [path for path in ours if path.exists()]
    if (FOLDER / "runs" / RUN / "plan.json").exists() and alive():
        stop()
    if there:
        say(f"removing what an earlier demo made: {', '.join(str(path.relative_to(ROOT)) for path in there)}")
    for path in there:
        path.unlink() if path.is_file() else shutil.rmtree(path)


def write_inputs() -> list[task.Example]:
    """Records, model folder and run.yaml; the held-out examples."""
    heading("A task, a tokenizer and a model without weights")
    drawn = task.examples(TRAINED + HELD_OUT, SEED, without=[e.answer for e in FRESH])
    task.write(FOLDER / "heldout.jsonl", drawn[:HELD_OUT])
    task.write(FOLDER / "train.jsonl", drawn[HELD_OUT:])
    newborn.write(FOLDER / "model")
    shutil.copy(HERE / "run.yaml", FOLDER)
    held_out, trained = task.read(FOLDER / "heldout.jsonl"), task.read(FOLDER / "train.jsonl")
    if not task.unseen([*held_out, *FRESH], trained):
        fail("a question that is held out is among the trained ones")
    say(f"{len(trained):,} records to learn from, such as: {trained[0].question} → {trained[0].answer}")
    say(f"{len(held_out)} held-out questions, whose letters are in no record, in no order")
    return held_out


def seed_of_the_run() -> int:
    """From the Plan, so that the model examined here starts from the very weights that the ranks will draw."""
    return int(json.loads(hpcft("plan", "run.yaml", "--json", show=False))["train"]["seed"])


def train() -> None:
    """hpcft submit, followed to its end."""
    heading("Training through hpcft submit")
    try:
        hpcft("submit", "run.yaml", "--follow")
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        stop()
        fail("interrupted; the run has been stopped")
    now = status()
    if now["state"] != "finished":
        fail(f"the run is {now['state']}: {now['why'] or 'see above'}; its log: hpcft logs {RUN}, typed in .demo")


def stop() -> None:
    """End the run where it is alive: it would outlive this process."""
    hpcft("cancel", RUN)
    patience = time.monotonic() + 60
    while alive():
        if time.monotonic() > patience:
            fail(f"run {RUN} does not end; look at: hpcft status {RUN}, typed in .demo")
        time.sleep(0.5)


def alive() -> bool:
    """Whether the run's processes are there."""
    return bool(status()["alive"])


def status() -> dict[str, Any]:
    """What hpcft knows of the run."""
    return dict(json.loads(hpcft("status", RUN, "--json", show=False)))


def ask_the_exported(held_out: Sequence[task.Example]) -> float:
    """Export, and from then on only transformers: the exact match, and answers to questions of this minute."""
    heading("Exporting, and asking the exported folder")
    hpcft("export", RUN, "--output", "trained")
    model, tokenizer = answers.load(FOLDER / "trained")
    after = examine(model, tokenizer, held_out, "after training")
    for asked, answer in zip(FRESH, answers.answers(model, tokenizer, [e.question for e in FRESH]), strict=True):
        verdict = "right" if answer == asked.answer else f"wrong: {asked.answer}"
        say(f"a fresh question: {asked.question} → {answer} ({verdict})")
    return after


def examine(model: Any, tokenizer: Any, held_out: Sequence[task.Example], when: str) -> float:
    """The share of held-out questions that are answered to the letter, with one of the answers shown."""
    began = time.monotonic()
    given = answers.answers(model, tokenizer, [e.question for e in held_out])
    share = answers.exact_match(given, [e.answer for e in held_out])
    say(f"exact match {when}: {share:.1%} of {len(held_out)} held-out questions ({time.monotonic() - began:.1f} s)")
    say(f"  for example: {held_out[0].question} → {given[0]!r} (right: {held_out[0].answer!r})")
    return share


def picture(before: float, after: float) -> None:
    """curve.png."""
    title = f"Sorting letters, learnt from nothing: exact match {before:.1%} → {after:.1%} on held-out questions"
    train_loss, eval_loss = curve.draw(FOLDER / "runs" / RUN / "metrics.jsonl", FOLDER / "curve.png", title)
    say(f"loss at the end: training {train_loss:.4f}, held-out {eval_loss:.4f}; the curve: .demo/curve.png")


def farewell(before: float, after: float, seconds: float) -> None:
    """Where everything lies, and what to type next."""
    heading(f"Done in {seconds:.0f} s: {before:.1%} → {after:.1%}")
    activate = os.path.relpath(Path(sys.prefix) / "bin" / "activate", FOLDER)
    print(f"""\
  .demo/run.yaml       what was asked for
  .demo/train.jsonl    what it learnt from; heldout.jsonl: what it never saw
  .demo/runs/{RUN}   the run: script, logs, metrics, checkpoints
  .demo/curve.png      its loss curve
  .demo/trained        the model: a Hugging Face folder, with a card of how it came to be

next:
  cd .demo && . {activate}
  hpcft status {RUN}
  python ../docs/demo/answers.py trained "sort python" "sort backwards jumble"
  hpcft submit run.yaml --name longer --max_steps 1000 --follow
  hpcft init my-run                # a run of your own: your model, your data, your cluster""")


def hpcft(*words: str, show: bool = True) -> str:
    """Run hpcft in .demo, on the screen with ``show``, else its stdout is returned; the demo fails where it fails."""
    if show:
        say(f"$ hpcft {' '.join(words)}")
    pipe = None if show else subprocess.PIPE
    done = subprocess.run([HPCFT, *words], cwd=FOLDER, stdout=pipe, text=True, timeout=LONGEST_SECONDS)
    if done.returncode != 0:
        fail(f"hpcft {' '.join(words)} ended with exit code {done.returncode}")
    return done.stdout or ""


def heading(text: str) -> None:
    """A line of its own with room above it."""
    say(f"\n== {text}")


def say(text: str) -> None:
    """Out at once: the subprocesses write to the same screen."""
    print(text, flush=True)


def fail(sentence: str) -> NoReturn:
    """End the demo with exit code 1."""
    sys.stdout.flush()
    sys.exit(f"\nthe demo failed: {sentence}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
