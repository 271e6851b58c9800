# Two commands for a newcomer: `make demo` and `make test`. Each makes its own .venv, installs pinned packages and runs.
# Options: PYTHON=/path/to/python3.11   VENV=dir   PIP_ARGS="pip options"   PYTEST_ARGS="-k q4"

VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
BIN := $(VENV)/bin
find_python := for p in python3.11 python3.12 python3.13 python3; do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done
PYTHON ?= $(shell $(find_python))
no_python := Python 3.11 or newer with venv was not found. Install it (Debian, Ubuntu: apt install python3 python3-venv), \
	or name one: make PYTHON=/path/to/python3.11

.DEFAULT_GOAL := help
.PHONY: help demo test lint tables new-format clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.installed ## draw with the embedded model, 16 bit against Q8_0, Q6_K, Q4_K and mixed (no GPU, no network)
	$(BIN)/flux-kernels demo --out out/demo.png

test: $(VENV)/.installed-test ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-test ## ruff, the type checker, generated tables up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/write_readme_tables.py --check
	$(BIN)/python tools/write_formats_page.py --check

tables: $(VENV)/.installed-test ## write the generated tables of README.md and docs/formats.md anew
	$(BIN)/python tools/write_readme_tables.py
	$(BIN)/python tools/write_formats_page.py

new-format: $(VENV)/.installed-test ## start a block format: make new-format NAME=Q7_X TYPE=99
	$(BIN)/python tools/new_format.py $(NAME) --ggml-type $(TYPE)

clean: ## remove the virtual environment and outputs
	rm -rf $(VENV) out

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "$(no_python)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps follow pyproject.toml and constraints.txt, so that a pull that changes either installs again. PIP_CONSTRAINT and
# PIP_BUILD_CONSTRAINT pin the build backend too (older and newer pip).
pip_install = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install $(PIP_ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(pip_install) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(pip_install) -e '.[test]'
	@touch $@ $(VENV)/.installed
