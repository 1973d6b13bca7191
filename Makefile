# Two commands do all their own set-up on a fresh machine with Python >= 3.10:
#   make quickstart   fine-tune the embedded vision-language model with AdamW and DiGraP on two ranks, and report
#   make test         lint and every test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
# Test processes side by side. Half of a test's time is waiting for ranks, so two fit on two cores; JOBS=0 runs in one.
JOBS ?= 2

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-fast cluster-tools lint format benchmark clean

quickstart: $(INSTALLED)
	$(BIN)/scale-digrap quickstart $(ARGS)

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope -m "not slow and not distributed" $(ARGS)

# Programs that the launch tests put on their hosts, and a browser for the report's test: installed as root with apt,
# else named. Without them those tests are skipped, with the reason.
cluster-tools:
	@bash .ci/cluster-tools

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/optimizer_step.py $(ARGS)

# torch goes first, at its pinned version: DeepSpeed's build asks for torch, and an unpinned one can be gigabytes larger.
# DeepSpeed is installed without compiling its operators; the ones that are used are compiled on first use.
$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("scale-digrap needs Python >= 3.10, but $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo "could not make a virtual environment: install your system's python3-venv package"; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) torch setuptools wheel ninja py-cpuinfo
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) --no-build-isolation --editable '.[dev,quickstart]'
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
