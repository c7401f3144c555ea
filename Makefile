# make quickstart | test | lint | bench     each makes .venv first if it is not there
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-nvme lint bench clean

install: $(VENV)/.installed

# torch first, by its pinned version: where a matching build lies on the machine it is taken, and nothing later replaces it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[data,test]'
	touch $@

quickstart: install
	$(BIN)/cpt quickstart

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# State in files (deepspeed.offload=nvme): DeepSpeed's extension is compiled first, for minutes.
test-nvme: install
	CPT_TEST_NVME=1 $(BIN)/python -m pytest tests/cpt/train/test_engine.py -k swapped_to_files

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.run_all

clean:
	rm -rf $(VENV) runs build *.egg-info
