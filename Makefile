# make quickstart: set up .venv and watch VPT tune a small pretrained ViT to handwritten digits.
# make check:      set up .venv, check style and types, run the tests that start no other processes: minutes.
# make test:       the same with all tests, and their coverage; what continuous integration runs.
# make gpu:        the acceptance on one GPU: tests/gpu, and figures of its speed in benchmarks/results. PART=methods
#                  (or distributed, kernels, speed) does one part, minutes; DRY=1 tries the tests themselves on a CPU.
# The first of these that runs and is new enough (a name may be a version manager's empty shim).
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
# Processes that run the tests, each with one thread: one more than two cores, since some tests wait for others.
WORKERS ?= 3

.PHONY: quickstart check test gpu lint docs setup benchmark clean

quickstart: .venv/.installed
	$(BIN)/dist-vpt train quickstart run.dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

check: .venv/.installed-dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not (gpu or distributed or slurm or slow)" $(TESTS)

test: .venv/.installed-dev lint docs
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report= -m "not gpu" $(TESTS)
	@$(BIN)/coverage report --fail-under=$(if $(TESTS),0,90) --skip-covered

# One process: tests share the GPU with nothing, which what is measured needs.
gpu: .venv/.installed-dev
	@$(if $(DRY),,$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch sees no CUDA device here; see nvidia-smi and dist-vpt doctor, or try the tests on the CPU with DRY=1")')
	$(if $(DRY),DIST_VPT_DRY_GPU_TESTS=1) $(BIN)/python -m pytest -m gpu $(if $(PART),tests/gpu/test_$(PART).py,tests/gpu)

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
