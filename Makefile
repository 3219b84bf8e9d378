# make run     installs into .venv and trains the main job (real handwritten digits), then writes its report.
# make test    the same set-up with the development tools, then lint, types and all tests; T=path for some of them.
# make quick   lint, types, and the tests that train nothing.
# make docs    the documentation as a site, in site/.
# make test-floor, make test-newest   all tests with the oldest packages that setup.cfg allows; with today's newest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
QUICK := tests/assignment/test_paths.py tests/assignment/test_policies.py tests/options tests/server \
	tests/test_import.py tests/test_misuse.py tests/test_npz.py tests/test_plot.py tests/test_public.py tests/test_rooms.py
T ?=

.PHONY: run test quick lint style docs test-floor test-newest clean

run: $(VENV)/.experiments
	$(BIN)/python -m experiments.train --config=experiments/configs/digits.py --workdir=runs/digits

# Types are checked on one core, so the tests begin meanwhile.
test: style
	$(BIN)/mypy & types=$$!; $(BIN)/python $(PYTEST) $(T); tests=$$?; wait $$types && exit $$tests

quick: lint
	$(BIN)/python $(PYTEST) $(QUICK)

lint: style
	$(BIN)/mypy

style: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

docs: $(VENV)/.dev
	$(INSTALL) --editable '.[docs]'
	$(BIN)/mkdocs build

test-floor test-newest: test-%: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)-$*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(VENV)-$* --upgrade \
	  --resolution $(if $(filter floor,$*),lowest-direct,highest) --editable '.[dev]'
	$(VENV)-$*/bin/python $(PYTEST) $(T)

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
	rm -rf $(VENV) $(VENV)-floor $(VENV)-newest
