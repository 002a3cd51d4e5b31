# make quickstart: set up .venv and watch VPT tune a small pretrained ViT to handwritten digits.
# make check:      set up .venv, check style and types, run the tests that start no other processes: minutes.
# make test:       the same with all tests, and their coverage; what continuous integration runs.
# The first of these that runs and is new enough (a name may be a version manager's empty shim).
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
# Processes that run the tests, each with one thread: one more than two cores, since some tests wait for others.
WORKERS ?= 3

.PHONY: quickstart check test lint docs setup benchmark clean

quickstart: .venv/.installed
	$(BIN)/dist-vpt train quickstart run.dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

check: .venv/.installed-dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not (gpu or distributed or slurm or slow)" $(TESTS)

test: .venv/.installed-dev lint docs
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report= $(TESTS)
	@$(BIN)/coverage report --fail-under=$(if $(TESTS),0,90) --skip-covered

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; a warning is an error.
docs: .venv/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

setup: .venv/.installed

benchmark: .venv/.installed
	$(BIN)/python benchmarks/step.py vpt_deep runtime.precision=bf16

.venv/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.made pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache
