# make quickstart | test | lint | bench     each makes .venv first if it is not there
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: image lock wheels install quickstart test test-nvme test-multinode test-slurm lint bench clean

install: $(VENV)/.installed

# torch first, by its pinned version: where a matching build lies on the machine it is taken, and nothing later replaces it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[data,eval,test]'
	touch $@

quickstart: install
	$(BIN)/cpt quickstart

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# State in files (deepspeed.offload=nvme): DeepSpeed's extension is compiled first, for minutes.
test-nvme: install
	CPT_TEST_NVME=1 $(BIN)/python -m pytest tests/cpt/train/test_engine.py -k swapped_to_files

# `cpt launch` over hosts that are namespaces of this machine; root, Debian. MARKS="long or not long" for all of them.
MARKS ?= not long
test-multinode: install
	tests/multinode/run.sh $(BIN)/python -m pytest -m "$(MARKS)"

# Jobs on a real Slurm of two virtual nodes in a folder of its own; root, Debian.
test-slurm: install
	tests/slurm/run.sh $(BIN)/python -m pytest

# The image: built offline on a base of debootstrap and run, as root; what it needs comes from apt, and only that stays.
image: install
	for tool in buildah debootstrap ip nsenter hostname; do command -v $$tool >/dev/null || missing=1; done; \
	test -z "$$missing" || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends buildah debootstrap iproute2 util-linux hostname; }
	$(BIN)/python -m benchmarks.launch.image --test

# The locks of the images' packages; after a change of pyproject.toml or constraints.txt.
lock: install
	$(BIN)/python docker/lock.py

# For a build without a network: docker/wheels/ with what the CPU lock (or VARIANT=cuda's) names.
VARIANT ?= cpu
wheels: install
	$(BIN)/pip download --require-hashes --no-deps -d docker/wheels \
		-r docker/requirements-build.txt -r docker/requirements-$(VARIANT).txt

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.run_all

clean:
	rm -rf $(VENV) runs build *.egg-info
