PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint photos speed annotate download orchestration corpus bench chaos sql clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# img2dataset asks for a Python 3.6 backport that hides the standard module from Prefect's servers
	-$(BIN)/python -m pip uninstall --quiet --yes dataclasses
	touch $(READY)

demo: setup
	$(BIN)/capfilt demo

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

photos: setup
	$(BIN)/python tests/benchmarks/photos.py

speed: setup
	$(BIN)/python tests/benchmarks/train_step.py

annotate: setup
	$(BIN)/python tests/benchmarks/annotate.py

download: setup
	$(BIN)/python tests/benchmarks/download.py

orchestration: setup
	$(BIN)/python tests/benchmarks/orchestration.py

corpus: setup
	$(BIN)/python tests/benchmarks/corpus.py

bench: photos speed annotate download orchestration corpus

# Faults at random moments; CAPFILT_CHAOS_SEED=N and CAPFILT_CHAOS_SEEDS=N choose the seeds
chaos: export CAPFILT_CHAOS_SEEDS ?= 20
chaos: export CAPFILT_CHAOS_OUTPUT ?= build/chaos.jsonl
chaos: setup
	$(BIN)/python -m pytest -s tests/chaos

# The answers in docs/sql.md
sql: setup
	PYTHONPATH=tests $(BIN)/python -m services.sql_answers

clean:
	rm -rf capfilt-demo capfilt-photos
