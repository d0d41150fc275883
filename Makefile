# Two commands for a fresh machine: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format tables bench clean

$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test,plots,models]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/digits.py --out out

test: lint
	$(BIN)/python -m pytest --durations=10
	# the kernel's module needs Triton, and has no examples
	$(BIN)/python -m pytest --doctest-modules --ignore=curvature/triton_gram.py backpack_ext curvature optim
	$(BIN)/python -m pytest --doctest-glob='*.rst' README.rst

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(STAMP)
	$(BIN)/python -m backpack_ext.support README.rst
	$(BIN)/python -m backpack_ext.training README.rst
	$(BIN)/python -m benchmarks --readme README.rst

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) out
