# make quickstart: set up .venv and watch VPT tune a small pretrained ViT to handwritten digits.
# make test:       set up .venv, check style and types, run the tests with coverage.
# The first of these that runs and is new enough (a name alone may be a version manager's empty shim).
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
# Tests are shared out over so many processes, each of which computes with one thread.
WORKERS ?= 2

.PHONY: quickstart test lint setup benchmark clean

quickstart: .venv/.installed
	$(BIN)/dist-vpt train configs/quickstart.yaml run.dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: .venv/.installed-dev lint
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report= $(TESTS)
	@$(BIN)/coverage report --fail-under=$(if $(TESTS),0,90) --skip-covered

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/.installed

benchmark: .venv/.installed
	$(BIN)/python benchmarks/step.py configs/method/vpt_deep.yaml runtime.precision=bf16

.venv/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache
