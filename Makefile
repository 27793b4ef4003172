# install demo test check slow bench docs: `make demo` and `make test` work on a machine with Python, git and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch 2.13.0 is a CPU build on the project's machines; with a GPU, install the torch you want into .venv yourself.
TORCH ?= torch==2.13.0
# accelerate imports deepspeed wherever it is installed: apart from the rest, for the tests that need it
DEEPSPEED := $(CURDIR)/$(VENV)/deepspeed

.PHONY: install demo test check slow bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[starter,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/python examples/starter/demo.py

test: install
	$(BIN)/python -m pytest -n 2 -m 'not slow'

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,torchao]'
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(DEEPSPEED) deepspeed einops hjson msgpack ninja py-cpuinfo
	$(BIN)/python -m pytest -m slow
	PYTHONPATH=$(DEEPSPEED) $(BIN)/python -m pytest -m slow tests/test_deepspeed.py

bench: demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/train_speed.py
	$(BIN)/python benchmarks/spo_and_topics.py
	$(BIN)/python benchmarks/generate_speed.py --model runs/demo --data examples/starter/heldout.jsonl
	$(BIN)/python benchmarks/constrained_speed.py runs/demo examples/starter/heldout.jsonl
	$(BIN)/python benchmarks/data_speed.py --rows 1000000

docs: install
	$(BIN)/python docs/make_reference.py

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
