# Everything that is done with this repository. Needs Python 3.11 to 3.13, git and make; the rest is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= 200
REMOTE ?= ../pipelib-remote

.PHONY: repro test test-long check format bench-train bench-tokenize bench-loader bench-hellaswag bench-harness bench-gpu bench-import bench-tracking remote ui setup clean help

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: .venv/ready .dvc/plots/page.html  ## install the pinned dependencies into .venv

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "$(PYTHON) is Python %d.%d; pipelib needs 3.11 to 3.13, for example: make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

.dvc/plots/page.html: .venv/ready
	@$(BIN)/pipelib plots-page

repro: setup     ## run the whole pipeline, or what of it is not up to date
	@$(BIN)/pipelib plan --check
	$(BIN)/dvc repro
	@$(BIN)/pipelib summary

test: setup      ## the tests
	$(BIN)/python -m pytest --numprocesses 2

test-long: setup ## the tests that take long, and those that kill at random, RUNS times (200)
	PIPELIB_TEST_RUNS=$(RUNS) $(BIN)/python -m pytest -m "long or random" -s

check: setup     ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup    ## put the code in its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-import: setup  ## time the import of your own files: MB/s, memory, requests
	$(BIN)/python bench/import_text.py $(ARGS)

bench-tokenize: setup  ## time tokenization, parquet to shards, against the plain way
	$(BIN)/python bench/encode_corpus.py $(ARGS)

bench-loader: setup  ## time batches out of 2 GB of shards
	$(BIN)/python bench/loader.py $(ARGS)

bench-train: setup  ## time one optimizer step, ours against a plain loop
	$(BIN)/python bench/train_step.py $(ARGS)

bench-hellaswag: setup  ## time HellaSwag against one example per forward pass
	$(BIN)/python bench/hellaswag.py $(ARGS)

bench-harness: setup  ## time the lm-eval harness on our model against its own on the exported folder
	$(BIN)/python bench/harness.py $(ARGS)

bench-gpu: setup ## on a GPU: check that the training is right there, then time it
	$(BIN)/python bench/gpu.py $(ARGS)

remote: setup    ## keep all outs in a second place, REMOTE (../pipelib-remote), for other clones and machines
	$(BIN)/dvc remote add --local --default --force store $(REMOTE)
	$(BIN)/dvc push --run-cache

bench-tracking: setup  ## time what MLflow costs a stage when it is away, silent, broken, slow or well
	$(BIN)/python bench/tracking.py $(ARGS)

ui: setup        ## compare runs in the browser
	@echo 'The runs are at http://127.0.0.1:5000/#/experiments/1/runs (MLflow begins with its view for chats).'
	$(BIN)/mlflow ui

clean: setup     ## list the stages' state and free it
	$(BIN)/pipelib clean
