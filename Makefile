# `make demo` and `make test` set up everything they need in .venv, on a machine with Python 3.11 or newer and a
# C++17 compiler. Another build of PyTorch: make TORCH=torch==2.11.0 demo.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint sanitize tsan clean

demo: .venv/ready
	$(BIN)/dejavu demo

test: .venv/ready
	$(BIN)/pytest -n auto

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Tests of kernels and of whole steps over a library in which every index and every access is checked, and the test of
# the threads alone. Not part of CI, whose machines may lack the compilers' sanitizers. --capture=sys lets a report out.
SANITIZED_TESTS := tests/kernels --ignore tests/kernels/triton tests/engine/test_step.py
SANITIZED := -g -O1 -fno-omit-frame-pointer -std=c++17 -pthread native/pool.cpp native/tests/pool_test.cpp
sanitize: .venv/ready
	mkdir -p build/sanitize
	$(CXX) -fsanitize=address,undefined -fno-sanitize-recover=all $(SANITIZED) -o build/sanitize/pool
	build/sanitize/pool
	$(BIN)/pip install -q cmake "nanobind>=2.12"
	$(BIN)/cmake -S . -B build/sanitize/native -DDEJAVU_CHECK=ON -DDEJAVU_SANITIZE=address,undefined \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build build/sanitize/native -j
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  DEJAVU_NATIVE=$(CURDIR)/build/sanitize/native $(BIN)/pytest -q -n 0 --capture=sys $(SANITIZED_TESTS)

tsan:
	mkdir -p build/sanitize
	$(CXX) -fsanitize=thread $(SANITIZED) -o build/sanitize/pool_tsan
	TSAN_OPTIONS=die_after_fork=0 build/sanitize/pool_tsan

# PyTorch comes first, so that the build already on the machine is kept.
.venv/ready: pyproject.toml CMakeLists.txt $(wildcard native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build
