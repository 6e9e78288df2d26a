# Each target works in a fresh clone: python3, make and the package index are all it needs.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
FLOORS := .venv-floors

.PHONY: demo test test-floors lint study bench gpu-check gpu-step

demo: $(READY)
	$(VENV)/bin/python examples/demo.py --output_dir demo

# Two at a time, a file each: they keep to one thread (tests/conftest.py).
test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

# The oldest of everything that pyproject.toml takes, on the oldest Python, in an environment of its
# own: the losses with what they need, then the trainer and the demo with what these need. It
# downloads 3 GB.
FLOOR := $(VENV)/bin/python -m uv pip install --quiet --no-config --python $(FLOORS) \
	--resolution lowest-direct --editable
test-floors: $(READY)
	$(VENV)/bin/python -m uv venv --quiet --no-config --clear --python 3.11 $(FLOORS)
	$(FLOOR) '.[triton,test]'
	$(FLOORS)/bin/python -m pytest tests/test_losses.py tests/test_links.py tests/test_autograd.py
	$(FLOOR) '.[train,test]'
	$(FLOORS)/bin/python -m pytest tests/test_train_sdxl.py tests/test_generate.py \
		tests/test_many_processes.py

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Does it align? Five losses on real digits: 14 minutes on two cores.
study: $(READY)
	$(VENV)/bin/python examples/mismatch_study.py --output_dir study

bench: $(READY)
	$(VENV)/bin/python benchmarks/bench_loss.py
	$(VENV)/bin/python benchmarks/host_cost.py
	$(VENV)/bin/python benchmarks/launch_cost.py
	$(VENV)/bin/python benchmarks/recompilations.py
	$(VENV)/bin/python benchmarks/bench_step.py
	$(VENV)/bin/python benchmarks/report.py

# On a machine with a GPU and its own Python, with torch, triton, pytest, hypothesis, numpy, mpmath
# (and pytest-xdist, to compile on many cores): the suite on real kernels, the race and memory
# checkers on small shapes, and the benchmarks. All that is found lies in OUT.
OUT ?= gpu-check
gpu-check: export PYTHONPATH := .:kernels:tests
gpu-check:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'gpu-check needs a GPU'"
	mkdir -p $(OUT)
	$(PYTHON) -m pytest tests/test_gpu.py --junitxml $(OUT)/gpu.xml
	$(PYTHON) -m pytest tests --ignore tests/test_gpu.py --ignore tests/test_aot.py \
		--junitxml $(OUT)/suite.xml $$($(PYTHON) -c "import xdist; print('-n 8')" 2>/dev/null)
	if command -v compute-sanitizer; then for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
		--log-file $(OUT)/$$tool.log $(PYTHON) -m pytest tests/test_pair_loss.py \
		tests/test_losses.py -k "(test_shapes and mapo) or every_loss_is_its_formula and 0.01-dpo" \
		|| exit 1; done; else echo "compute-sanitizer is not there" | tee $(OUT)/sanitizer.log; fi
	$(PYTHON) benchmarks/bench_loss.py --preset full --rounds 10 --output_dir $(OUT)
	$(PYTHON) benchmarks/report.py $(OUT)/*.csv

# A training step of the real SDXL, in ten minutes: needs diffusers, transformers, accelerate, peft.
gpu-step: export PYTHONPATH := .:kernels
gpu-step:
	$(PYTHON) benchmarks/bench_step.py --preset gpu --output_dir $(OUT)

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint .ci/constraints.txt \
		--editable '.[triton,train,dev]'
	touch $(READY)
