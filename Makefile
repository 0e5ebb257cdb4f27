# make setup   .venv with the package, its tests and PyTorch
# make demo    the whole story on the bundled model, about 5 minutes on two CPU cores
# make test    lint, types and all tests
# make kernels  every shape of the attention kernels through the TPU compiler, and their cost in its schedule
# make pods    every config through the TPU and GPU compilers for its targets: docs/pods.md, an hour on two cores
# make gpu     what needs a GPU: the kernels' tests there, and the benchmarks, with the Python that has jax[cuda]
# make compat  the fast tests on Python 3.12 with the newest jax; those that need PyTorch are skipped there

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
export JAX_PLATFORMS ?= cpu

# A CPU build of PyTorch: the tests and the demo compare against it. Elsewhere `TORCH=torch` takes the default build.
TORCH ?= torch==2.13.0
WORKERS ?= auto

.PHONY: setup demo test lint kernels pods gpu compat clean

setup: .venv/.ready

.venv/.ready: setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -qq --upgrade pip
	.venv/bin/python -m pip install -qq "$(TORCH)"
	.venv/bin/python -m pip install -qq -e ".[test,torch,tpu]"
	touch $@

demo: setup
	rm -rf runs/demo
	.venv/bin/dlm demo --out runs/demo

lint: setup
	.venv/bin/ruff check .
	.venv/bin/shellcheck -x launch/*.sh launch/*.sbatch
	.venv/bin/mypy

test: lint
	.venv/bin/python -m pytest -n $(WORKERS) -q

kernels: setup
	.venv/bin/python -m pytest -n $(WORKERS) -q -m kernels
	.venv/bin/python benchmarks/attention_tpu.py

# Further environments: .venv-NAME by an interpreter, with some of the package's extras.
.venv-%/.ready: setup.py
	$(INTERPRETER) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -qq --upgrade pip
	.venv-$*/bin/python -m pip install -qq -e ".[$(EXTRAS)]"
	touch $@

.venv-pods/.ready: INTERPRETER = $(PYTHON)
.venv-pods/.ready: EXTRAS = tpu,gpu
pods: .venv-pods/.ready
	.venv-pods/bin/python benchmarks/pods.py

gpu: export JAX_PLATFORMS =
gpu:
	$(PYTHON) -m pytest -q tests/attention/test_gpu.py tests/attention/test_compiled_for_gpu.py
	$(PYTHON) benchmarks/attention_gpu.py
	$(PYTHON) benchmarks/sampling_7b.py

.venv-compat/.ready: INTERPRETER = $(PYTHON312)
.venv-compat/.ready: EXTRAS = test,tpu
compat: .venv-compat/.ready
	.venv-compat/bin/python -m pytest -n $(WORKERS) -q -m "not slow"

clean:
	rm -rf .venv .venv-compat .venv-pods build dist *.egg-info
