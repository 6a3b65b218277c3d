# Two commands, each from nothing: `make demo` runs the whole way, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# The packages are installed without compiled modules: the first import of a module keeps its own.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint check heavy gpu clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/mmrec demo

test: $(READY)
	$(MAKE) --no-print-directory --jobs=2 lint check  # mypy has one thread

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: $(READY)
	$(BIN)/pytest -q -m 'not heavy' --durations=15 -n auto --dist loadfile --no-loadscope-reorder

heavy: $(READY)
	$(BIN)/pytest -q -m heavy -n auto --dist loadfile --no-loadscope-reorder

gpu: $(READY)
	$(BIN)/python -m tests.gpu --out gpu-results.json

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "mmrec needs Python 3.11 or newer; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { echo "this Python cannot make virtual environments; run: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --group dev --editable '.[offline]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
