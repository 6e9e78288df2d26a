# Each target works in a fresh clone: python3, make and the package index are all it needs.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
FLOORS := .venv-floors

.PHONY: demo test test-all test-floors lint study bench aot-matrix gpu-check gpu-step

# Of another family: make demo FAMILY=sd3
FAMILY ?= sdxl
demo: $(READY)
	$(VENV)/bin/python examples/demo.py --family $(FAMILY) \
		--output_dir $(if $(filter sdxl,$(FAMILY)),demo,demo-$(FAMILY))

# Two at a time, as they keep to one thread (tests/conftest.py); one that is done takes over from the
# other. Under ten minutes on two cores.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist worksteal
test: lint
	$(PYTEST) -m "not slow"

# With what is marked slow: the whole of cross products of which `make test` has a part.
test-all: lint
	$(PYTEST)

# The oldest of everything that pyproject.toml takes, on the oldest Python, in an environment of its
# own: the losses with what they need, then the trainer and the demo with what these need. It
# downloads 3 GB.
FLOOR := $(VENV)/bin/python -m uv pip install --quiet --no-config --python $(FLOORS) \
	--resolution lowest-direct --editable
test-floors: $(READY)
	$(VENV)/bin/python -m uv venv --quiet --no-config --clear --python 3.11 $(FLOORS)
	$(FLOOR) '.[triton,test]'
	$(FLOORS)/bin/python -m pytest tests/loss/test_losses.py tests/kernels/test_links.py tests/loss/test_autograd.py
	$(FLOOR) '.[train,test]'
	$(FLOORS)/bin/python -m pytest tests/trainer/test_train_sdxl.py tests/trainer/test_generate.py \
		tests/trainer/test_many_processes.py

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PYTHONPATH=.:kernels:examples $(VENV)/bin/lint-imports --no-logo

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

# What the compiler of each Triton makes of the kernels; downloads each, 200 MB.
aot-matrix: $(READY)
	$(VENV)/bin/python benchmarks/compiled_code.py

# On a machine with a GPU and its own Python, which needs torch, triton, pytest, hypothesis, numpy and
# mpmath, and no git: its tests, the benchmarks, the memory and race checkers, and the suite on real
# kernels, in twenty minutes at most. STEPS="tests headline" runs only these, DRY_RUN=1 the least of
# each on a CPU. All that is found lies in OUT.
OUT ?= gpu-check
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --output_dir $(OUT) \
		$(if $(STEPS),--steps $(STEPS)) $(if $(DRY_RUN),--dry_run)

# A training step of the real SDXL, in ten minutes: needs diffusers, transformers, accelerate, peft.
gpu-step: export PYTHONPATH := .:kernels
gpu-step:
	$(PYTHON) benchmarks/bench_step.py --preset gpu --output_dir $(OUT)

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint .ci/constraints.txt \
		--editable '.[triton,train,dev]'
	touch $(READY)
