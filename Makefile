# make run   installs into .venv and trains the main job (real handwritten digits), then writes its report.
# make test  the same set-up with the development tools, then lint, types and all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test clean

run: $(VENV)/.experiments
	$(BIN)/python -m experiments.train --config=experiments/configs/digits.py --workdir=runs/digits

test: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.experiments: $(VENV)/.created setup.cfg pyproject.toml constraints.txt
	$(INSTALL) --editable '.[experiments]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created setup.cfg pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.experiments

clean:
	rm -rf $(VENV)
