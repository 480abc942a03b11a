# The two commands of the README are `make demo` and `make test`. Each target prepares a virtual
# environment in .venv with pinned packages and the compiled extension, and reuses what is there.
PYTHON ?= python3
CXX ?= c++
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test test-distributed slow sanitize sanitized bench bench-quick lint format clean structure architectures cuda-check cuda-build gpu-report

help:
	@echo "make demo    layers leave a small network: about a minute, results in runs/demo"
	@echo "make test    every test but the slow ones"
	@echo "make test-distributed  DDP, FSDP2 and tensor parallel on 2 and 4 processes, and the examples"
	@echo "make slow    the slow ones too: full sizes"
	@echo "make structure  public models folded, with torchvision, timm, transformers and onnxruntime (6 GB)"
	@echo "make architectures  the same at full size, as a table (docs/architectures.md)"
	@echo "make sanitize  the native code under ASan and UBSan"
	@echo "make bench   ratios against peers, measured in this run: about 25 minutes; bench-quick: fewer cases"
	@echo "make lint    ruff, mypy and clang-format; make format repairs what can be repaired"
	@echo "make cuda-check   the CUDA kernels, proven on a machine without a GPU"
	@echo "make cuda-build   build them against a CUDA torch in .venv-cuda (5.5 GB)"
	@echo "make gpu-report   tests and benchmarks on this machine's GPU (benchmarks/gpu.md)"
	@echo "make clean   remove everything that was built"

$(VENV)/packages: requirements/dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "layer_collapse: no $(PYTHON) found; install Python 3.10 or newer (Debian: apt-get install python3 python3-venv) or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "layer_collapse: needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "layer_collapse: this Python cannot make virtual environments; install them (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

# Tests and the linter read the tree itself: an editable install, compiled in place.
$(VENV)/extension: $(VENV)/packages $(SOURCES)
	@command -v $(firstword $(CXX)) >/dev/null || { echo "layer_collapse: no C++ compiler found (looked for $(CXX)); install g++ (Debian: apt-get install g++) or set CXX=..." >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(VENV)/extension
	$(BIN)/layer-collapse demo --out runs/demo

test: $(VENV)/extension
	$(BIN)/python -m pytest

test-distributed: $(VENV)/extension
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed

slow: $(VENV)/extension
	$(BIN)/python -m pytest -m "slow or not slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed -m "slow or not slow"

# The tests of the ops with every memory access and every operation checked. Leaks are not looked for
# (the interpreter's own are many), nor is what torch.compile makes of the ops. The loops of lesser
# machines run in `make test` alone.
SANITIZED := build/sanitize
PRELOAD = $$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)

sanitized: $(VENV)/packages
	LAYER_COLLAPSE_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp

sanitize: sanitized
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -o pythonpath=$(SANITIZED)/lib -p no:cacheprovider -q -s tests/ops tests/test_core.py -k "not opcheck and not compile and not older_machines"

# A case measures for as long as it needs: no timeout. A quick run leaves results.json, and with it
# the README's numbers, alone.
BENCH = $(BIN)/python -m pytest benchmarks --quiet --benchmark-quiet --timeout=0

# REPEATS=3: every case three times, one pass after the other; the table then gives the spread.
# CASES="masked_step or selection": only these files; what the others gave stays.
REPEATS ?= 1
CASES ?= test
bench: $(VENV)/extension
	$(BENCH) -k "$(CASES)" --repeats=$(REPEATS) --results=benchmarks/results.json
	$(BIN)/python -m benchmarks.plot

bench-quick: $(VENV)/extension
	$(BENCH) --quick --results=benchmarks/results-quick.json

lint: $(VENV)/extension
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/cuda_on_cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/cuda_on_cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

cuda-check: $(VENV)/extension
	$(BIN)/python tests/cuda_check.py

# A torch with CUDA, and the package built for it in a folder of its own: nothing is installed, so
# `make structure`, which shares the environment, always tests the tree.
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_BUILD := build/cuda
$(CUDA_VENV)/packages: requirements/cuda-build.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/pip install --quiet --disable-pip-version-check -r requirements/cuda-build.txt
	@touch $@

$(CUDA_BUILD)/built: $(CUDA_VENV)/packages $(SOURCES) $(shell find layer_collapse -name '*.py')
	rm -rf $(CUDA_BUILD)/lib
	LAYER_COLLAPSE_CUDA=1 MAX_JOBS=$${MAX_JOBS:-2} $(CUDA_BIN)/python setup.py -q build --build-lib $(CUDA_BUILD)/lib --build-temp $(CUDA_BUILD)/temp
	@touch $@

# -P and pythonpath: the package that was built, never the tree's.
IN_CUDA_BUILD = PYTHONPATH=$(CURDIR)/$(CUDA_BUILD)/lib $(CUDA_BIN)/python -P

# First whether the kernels load at all: the tests skip what a build without them lacks. A machine
# with a GPU names it.
cuda-build: $(CUDA_BUILD)/built
	$(IN_CUDA_BUILD) -c "from layer_collapse.ops import cuda; assert cuda.BUILT, cuda.REFUSAL"
	$(IN_CUDA_BUILD) -m pytest -o pythonpath=$(CUDA_BUILD)/lib -p no:cacheprovider -q tests/ops tests/test_core.py
	$(IN_CUDA_BUILD) -m layer_collapse.cli doctor > $(CUDA_BUILD)/doctor
	@cat $(CUDA_BUILD)/doctor
	grep -q '^cuda_kernels  *built$$' $(CUDA_BUILD)/doctor
	grep -q '^cuda_device  *no CUDA device$$' $(CUDA_BUILD)/doctor || nvidia-smi -L

# torchvision needs the torch of .venv-cuda, which works without a GPU too. The extension is the
# tree's own: a binary of the stable ABI serves every later torch of the same Python.
$(CUDA_VENV)/structure: $(CUDA_VENV)/packages requirements/structure.txt
	$(CUDA_BIN)/pip install --quiet --disable-pip-version-check -r requirements/structure.txt
	@touch $@

structure: $(VENV)/extension $(CUDA_VENV)/structure
	HF_HUB_OFFLINE=1 $(CUDA_BIN)/python -m pytest tests/structure

architectures: $(VENV)/extension $(CUDA_VENV)/structure
	HF_HUB_OFFLINE=1 $(CUDA_BIN)/python -m tests.structure.table

gpu-report: $(CUDA_BUILD)/built
	PYTHONPATH=$(CURDIR)/$(CUDA_BUILD)/lib:$(CURDIR) $(CUDA_BIN)/python -P -m benchmarks.gpu_report

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info layer_collapse/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
