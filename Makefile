# What a developer may ask for. The first demo or test makes .venv and installs into it; after that no network is needed.
.DEFAULT_GOAL := help
.PHONY: help install demo test slow lint format bench bench-peers soak clean
SHELL := /bin/sh

EXTRAS ?= worker,models,onnx,openvino,dev
ARGS ?=
MINUTES ?= 20
SEED ?= 1
# Tests wait for servers and leases more than they compute: twice the cores of a small machine.
JOBS ?= 4
BIN := .venv/bin
READY := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PIP_NO_INPUT := 1
# Every process would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo 'make demo     install, render pictures, annotate them, score the boxes'
	@echo 'make test     run the tests; ARGS="tests/jobs -x" chooses and changes them'
	@echo 'make slow     the sweeps that make test leaves out: thousands of evil pictures, every fault at every point'
	@echo 'make lint     ruff, mypy and the import rules'
	@echo 'make format   let ruff repair and format the code'
	@echo 'make bench    measure beside the limit and the peers; ARGS=--quick only sees that it runs'
	@echo 'make bench-peers  install the peers that are not in the extras, for make bench, into .venv-bench'
	@echo 'make soak     random faults for MINUTES="$(MINUTES)" on real servers, then count'
	@echo 'make install  only make .venv with the extras of EXTRAS="$(EXTRAS)"'
	@echo 'make clean    delete what builds, tools and the demo have written; .venv stays'

demo: $(READY)
	$(BIN)/python -P demo/run.py $(ARGS)

test: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

slow: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m slow --timeout 3600 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -P benchmarks/run.py $(ARGS)

# Peers see the libraries of .venv (torch, ultralytics) through a .pth file, so that both sides run the very same.
bench-peers: $(READY)
	$(BIN)/python -m venv .venv-bench
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/imagemill-venv.pth"
	for list in benchmarks/peers/requirements-*.txt; do \
	  .venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r "$$list" || exit 1; \
	done

install: $(READY)

# setuptools comes first and pinned, so that building our own package downloads nothing.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

$(BIN)/python:
	@for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  "$$python" -m venv .venv && exit 0; \
	  rm -rf .venv; \
	  echo "$$python cannot make a virtual environment: on Debian or Ubuntu install python3-venv" >&2; exit 1; \
	done; \
	echo 'imagemill needs Python 3.11 or newer, and none is on PATH' >&2; exit 1

clean:
	rm -rf build dist .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Random faults on real servers, then everything must add up; prints what happened.
soak: $(READY)
	$(BIN)/python -P tests/soak.py --minutes $(MINUTES) --seed $(SEED)
