# The commands of this repository. Needs Python 3.11 to 3.13, git and make; `make setup` installs the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= 200
REMOTE ?= ../pipelib-remote

.PHONY: repro test test-fast test-long coverage check format bench-train bench-tokenize bench-loader bench-hellaswag bench-harness bench-gpu bench-import bench-spikes bench-tracking bench-serve remote ui setup clean help

help:            ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 17

setup: .venv/ready .dvc/plots/page.html  ## install the pinned dependencies into .venv

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "$(PYTHON) is Python %d.%d; pipelib needs 3.11 to 3.13, for example: make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

.dvc/plots/page.html: .venv/ready
	@$(BIN)/pipelib plots-page

repro: setup     ## run the stages of the pipeline that are not up to date
	@$(BIN)/pipelib plan --check
	$(BIN)/dvc repro
	@$(BIN)/pipelib summary

# Containers set it, and then each process compiles all of the tests anew.
test test-fast test-long: export PYTHONDONTWRITEBYTECODE :=

test: setup      ## run the tests
	$(BIN)/python -m pytest --numprocesses 2

test-fast: setup ## run the tests that take a minute in all, for the loop while coding
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow"

coverage: setup  ## run the tests and list the lines that none of them runs in its own process
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pytest-cov
	$(BIN)/python -m pytest --numprocesses 2 --cov=src --cov=stages --cov-report=term-missing:skip-covered $(ARGS)

test-long: setup ## run the long tests, and the tests that kill at random RUNS times (200)
	PIPELIB_TEST_RUNS=$(RUNS) $(BIN)/python -m pytest -m "long or random" -s

check: setup     ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup    ## format the code and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-import: setup  ## time the import of your own files: MB/s, memory, requests
	$(BIN)/python bench/import_text.py $(ARGS)

bench-tokenize: setup  ## time tokenization, from parquet to shards, against a plain loop
	$(BIN)/python bench/encode_corpus.py $(ARGS)

bench-loader: setup  ## time the loader on 2 GB of shards
	$(BIN)/python bench/loader.py $(ARGS)

bench-train: setup  ## time an optimizer step, ours against a plain PyTorch loop
	$(BIN)/python bench/train_step.py $(ARGS)

bench-hellaswag: setup  ## time HellaSwag against one example per forward pass
	$(BIN)/python bench/hellaswag.py $(ARGS)

bench-harness: setup  ## time lm-eval with our model in memory against its own Hugging Face model
	$(BIN)/python bench/harness.py $(ARGS)

bench-serve: setup  ## time the server with 1 to 32 clients, against transformers and llama.cpp
	$(BIN)/python bench/serving.py $(ARGS)

bench-gpu: setup ## on a GPU: check that training is correct, then time it
	$(BIN)/python bench/gpu.py $(ARGS)

remote: setup    ## push all outs to REMOTE (../pipelib-remote), for other clones and machines
	$(BIN)/dvc remote add --local --default --force store $(REMOTE)
	$(BIN)/dvc push --run-cache

bench-spikes: setup ## what train.spike saves of planted bad batches; ARGS: --help
	$(BIN)/python bench/spikes.py $(ARGS)

bench-tracking: setup  ## time what MLflow costs a stage: dead, silent, broken, slow or healthy server
	$(BIN)/python bench/tracking.py $(ARGS)

ui: setup        ## compare runs in the browser
	@echo 'The runs are at http://127.0.0.1:5000/#/experiments/1/runs (MLflow opens on its page for chats).'
	$(BIN)/mlflow ui

clean: setup     ## list the stages' state and delete it
	$(BIN)/pipelib clean
