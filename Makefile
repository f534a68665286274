# Every target sets up .venv by itself. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint bench docs clean

demo: $(VENV)/.installed
	$(BIN)/fastgen demo

# One process per core, one thread in each; the tests of a file share what is costly to set up.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m "not slow"

test-all: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.installed
	$(BIN)/fastgen bench --shape qwen2-0.5b --workload mixed --threads 2

# Tables that are printed by what decides them.
docs: $(VENV)/.installed
	$(BIN)/python -m fastgen.generate > GENERATE.md

# Every causal LM type of the installed transformers, and the table of them.
models: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m every_model --table MODELS.md

# The same under the newest and the oldest supported transformers.
matrix: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m every_model.matrix

# torch comes first: with it installed, nothing else pulls another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .matrix build dist *.egg-info
