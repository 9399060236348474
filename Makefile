# `make demo` runs the whole loop on the embedded playground; `make test` runs the tests. Both need only Python and make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test check bench clean

demo: .venv/installed
	$(BIN)/accvideo demo --out runs/demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not slow"

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/installed
	$(BIN)/python benchmarks/distill_step.py --bfloat16 --lora

clean:
	rm -rf .venv runs

# torch comes first: the CPU build of the constraints file is found where pip is told to look for it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
