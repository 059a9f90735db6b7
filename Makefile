# `make demo` and `make test` set up everything they need in .venv, on a machine with Python 3.11 or newer and a
# C++17 compiler. Another build of PyTorch: make TORCH=torch==2.11.0 demo.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/dejavu demo

test: .venv/ready
	$(BIN)/pytest -n auto

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# PyTorch comes first, so that the build already on the machine is kept.
.venv/ready: pyproject.toml CMakeLists.txt $(wildcard native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build
