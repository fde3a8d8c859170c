# Everything here works on a fresh machine: each target builds what it needs first (.venv), once.

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
FOUND := $(shell for v in 3.13 3.12 3.11 3.14 3.10; do \
	p=$$(command -v python$$v) && "$$p" -c 'import ensurepip, venv' 2>/dev/null && echo "$$p" && break; done)
PYTHON ?= $(or $(shell python3 -c 'import ensurepip, sys, venv; print(sys.executable if sys.version_info >= (3, 11) else "")' 2>/dev/null),$(FOUND))

.DEFAULT_GOAL := help
.PHONY: help demo test campaign equivalence resume-matrix oracle check golden slurm-up slurm-down clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1#\2/p' $(MAKEFILE_LIST) | column -t -s '#'

demo: $(READY)  ## train a small model on this machine, from YAML to an answer (two minutes after set-up)
	$(PY) docs/demo/demo.py

test: $(READY) check  ## every check and every test, on a real Slurm where it can be installed
	@$(PY) -m tests.loopback install
	$(PY) -m pytest -n 2 --ignore=tests/endtoend
	@# Whole runs of several ranks spend most of their time waiting for Slurm: two at a time, and nothing beside them.
	$(PY) -m pytest -n 2 tests/endtoend

campaign: $(READY)  ## the slow proofs: every preemption, two dozen cancellations at random moments, every objective (an hour)
	@$(PY) -m tests.loopback install
	HPCFT_CAMPAIGN=1 $(PY) -m pytest -m campaign --ignore=tests/endtoend
	HPCFT_CAMPAIGN=1 $(PY) -m pytest tests/endtoend -s --durations=0

equivalence: $(READY)  ## every strategy against one process, on eight families of models; writes the table of the docs
	$(PY) -W ignore -m tests.train.equivalence

resume-matrix: $(READY)  ## saved under every strategy, resumed under every other; writes the table of the docs
	$(PY) -W ignore -m tests.train.resume_matrix

oracle:  ## the losses that TRL makes of two pairs, to compare with tests/train/oracle.py (any Python with trl 1.16.0)
	PYTHONPATH=. $(or $(PYTHON),python3) -W ignore -m tests.train.oracle

check: $(READY)  ## style, types, import contracts
	$(VENV)/bin/ruff check --no-fix .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

golden: $(READY)  ## write the scripts in sbatch/, the reference pages and tests/data/masks anew; then read the diff
	$(PY) -m tests.golden

slurm-up: $(READY)  ## start a private four-node Slurm on this machine, to try hpcft on
	@$(PY) -m tests.loopback install
	@$(PY) -m tests.loopback up --gpus 2

slurm-down: $(READY)  ## stop it
	@$(PY) -m tests.loopback down

clean:  ## remove everything that make has made
	@if [ -x $(PY) ] && [ -d .loopback ]; then $(PY) -m tests.loopback down; fi
	rm -rf $(VENV) .loopback .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# A plain path file (editable_mode=compat) instead of setuptools' import hook, which every start of Python in this
# environment would pay for. The lock has releases that need Python 3.11; on 3.10 the ranges of setup.cfg decide.
$(READY): requirements.lock setup.cfg setup.py
	@test -n "$(PYTHON)" || { echo "Error: no Python 3.10 or later with venv found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Building $(VENV) with $(PYTHON): a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	then $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock; \
	else $(PY) -m pip install --quiet --disable-pip-version-check '.[dev]'; fi
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --use-pep517 \
		--config-settings editable_mode=compat -e .
	@touch $@
