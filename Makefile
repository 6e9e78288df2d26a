# Each target works in a fresh clone: python3, make and the package index are all it needs.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
INSTALL := $(VENV)/bin/python -m pip install --quiet --constraint .ci/constraints.txt

.PHONY: demo test lint bench gpu-check

demo: $(READY)
	$(VENV)/bin/python examples/demo.py --output_dir demo

test: lint
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python benchmarks/bench_loss.py

# On a machine with a GPU and its own Python, with torch, triton, pytest, hypothesis, numpy, mpmath:
# the whole suite on real kernels, then the race and memory checkers on small shapes.
gpu-check: export PYTHONPATH := .:kernels
gpu-check:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'gpu-check needs a GPU'"
	$(PYTHON) -m pytest tests/test_gpu.py tests
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PYTHON) -m pytest tests/test_pair_loss.py -k "test_shapes and mapo" || exit 1; done

# torch comes first, by itself, so that nothing else can pull in another build of it.
$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[triton,train,dev]'
	touch $(READY)
