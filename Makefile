# `make help` lists what there is. Everything below needs only Python and make: the targets set up their own environments.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
export JAX_PLATFORMS ?= cpu

# A CPU build of PyTorch: the tests and the demo compare against it. `make TORCH=torch` takes the default build.
TORCH ?= torch==2.13.0
WORKERS ?= auto

.PHONY: help setup demo lint test test-slow fuzz attacks mutants engines kernels pods pod-step gpu compat docs reference clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: .venv/.ready ## make .venv with the package, its tests and PyTorch

.venv/.ready: setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -qq --upgrade pip
	.venv/bin/python -m pip install -qq "$(TORCH)"
	.venv/bin/python -m pip install -qq -e ".[test,eval,torch,tpu,gguf,docs]"
	touch $@

demo: setup ## adapt the bundled model, compare, infill and export, about 5 minutes on two CPU cores
	rm -rf runs/demo
	.venv/bin/dlm demo --out runs/demo

lint: setup ## ruff, shellcheck, hadolint and mypy
	.venv/bin/ruff check .
	.venv/bin/hadolint launch/docker/Dockerfile
	.venv/bin/shellcheck -x launch/*.sh launch/*.sbatch tests/convert/*.sh
	.venv/bin/mypy

test: lint ## lint, and every test that is not slow
	.venv/bin/python -m pytest -n $(WORKERS) -q -m "not slow"

test-slow: setup ## the tests that take long: the notebooks, the demo, the benchmarks, kills at random
	.venv/bin/python -m pytest -n $(WORKERS) -q -m slow

fuzz: setup ## 2,000 changes of each file that comes from outside (DLM_FUZZ=N: N of each), and what came of them, 9 minutes
	DLM_FUZZ=$${DLM_FUZZ:-2000} .venv/bin/python -m pytest -q -s tests/test_fuzz.py

attacks: setup ## 200 flipped bits, 20 pairs of runs on one directory, 40 kills and planted files, and what came of them
	.venv/bin/python tests/attacks.py

mutants: setup ## 100 single changes of the mathematics (SAMPLE=N: N of them), and how many the tests notice, an hour
	.venv/bin/python -m pip install -qq -e ".[mutants]"
	.venv/bin/python tests/mutants.py --sample $${SAMPLE:-100}

engines: setup ## build llama.cpp and write the same texts in it as here, 15 minutes (needs cmake); authors' classes of DLM_AUTHORS
	PYTHON=.venv/bin/python tests/convert/build_llama_cpp.sh .engines
	LLAMA_CPP=$(CURDIR)/.engines/build/bin .venv/bin/python -m pytest -q -s tests/convert/test_llama_cpp.py tests/convert/test_authors.py

kernels: setup ## every shape of the attention kernels through the TPU compiler, and their cost in its schedule
	.venv/bin/python -m pytest -n $(WORKERS) -q -m kernels
	.venv/bin/python benchmarks/attention_tpu.py

docs: setup ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build -q
	@echo "read it with: .venv/bin/python -m http.server -d site"

reference: setup ## write what the docs take from the code: the lists of functions, flags and config keys, and the figures
	.venv/bin/python docs/make_api.py
	.venv/bin/python docs/make_reference.py
	.venv/bin/python docs/make_figures.py

# Further environments: .venv-NAME, made by INTERPRETER with some of the package's EXTRAS.
.venv-%/.ready: setup.py
	$(INTERPRETER) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -qq --upgrade pip
	.venv-$*/bin/python -m pip install -qq -e ".[$(EXTRAS)]"
	touch $@

.venv-pods/.ready: INTERPRETER = $(PYTHON)
.venv-pods/.ready: EXTRAS = tpu,gpu
pods: .venv-pods/.ready ## every config through the TPU and GPU compilers for its targets: docs/pods.md, an hour on two cores
	.venv-pods/bin/python benchmarks/pods.py

# MaxText needs Python 3.12 or newer.
.venv-maxtext/.ready: INTERPRETER = $(PYTHON312)
.venv-maxtext/.ready: EXTRAS = maxtext
pod-step: .venv-maxtext/.ready ## the training step on pods beside MaxText's, by the TPU compiler's schedule, an hour
	.venv-maxtext/bin/python benchmarks/pod_step.py

gpu: export JAX_PLATFORMS =
gpu: ## what needs a GPU: the kernels' tests and benchmarks, with the Python that has jax[cuda]
	$(PYTHON) -m pytest -q tests/attention/test_gpu.py tests/attention/test_compiled_for_gpu.py
	$(PYTHON) benchmarks/attention_gpu.py
	$(PYTHON) benchmarks/sampling_7b.py

.venv-compat/.ready: INTERPRETER = $(PYTHON312)
.venv-compat/.ready: EXTRAS = test,tpu
compat: .venv-compat/.ready ## the fast tests on Python 3.12 with the newest jax, without PyTorch
	.venv-compat/bin/python -m pytest -n $(WORKERS) -q -m "not slow"

clean: ## remove the environments and what was built
	rm -rf .venv .venv-compat .venv-pods .venv-maxtext .engines site build dist *.egg-info
