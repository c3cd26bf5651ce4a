# Everything runs in .venv, made on first use with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

PEERS := $(patsubst benchmarks/environments/%.txt,.venv-peers/%/.installed,$(wildcard benchmarks/environments/*.txt))
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench peers gates gates-newest sanitize clean

demo: $(STAMP)
	$(BIN)/aaac-ao demo

# File by file in several processes: fixtures of a file are made once, and some take a minute or more
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A peer whose environment cannot be built becomes a row "not available".
bench: $(STAMP)
	-$(MAKE) --keep-going peers
	$(BIN)/python $(PIP) -c constraints.txt -e '.[bench]'
	mkdir -p build
	$(BIN)/python -m benchmarks.linear --device cpu --shapes 1024x1024 4096x4096 --tokens 1 4 16 64 --json build/linear.json
	$(BIN)/python -m benchmarks.generate --device cpu --models demo --json build/generate.json
	$(BIN)/python -m benchmarks.encode_speed
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.quality --json build/quality.json --plot build/quality.png

peers: $(PEERS)

.venv-peers/%/.installed: benchmarks/environments/%.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python $(PIP) $$(grep '^torch==' constraints.txt)
	.venv-peers/$*/bin/python $(PIP) $$(grep '^torch==' constraints.txt) -r $<
	touch $@

# Machine instructions of the GPU kernels, counted without a GPU, against their budgets
gates: $(STAMP)
	$(BIN)/python benchmarks/sass.py --check

# The same with the newest Triton, in an environment of its own
gates-newest: .venv-newest/.installed
	.venv-newest/bin/python $(PIP) --upgrade triton
	.venv-newest/bin/python benchmarks/sass.py --check

.venv-newest/.installed:
	$(PYTHON) -m venv .venv-newest
	touch $@

# All C code under AddressSanitizer and UndefinedBehaviorSanitizer; `make test` runs it too
SANITIZE := -g -O1 -std=gnu11 -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
sanitize:
	mkdir -p build
	$(CC) $(SANITIZE) -ffp-contract=off tests/cpu_kernel_sanitize.c -o build/cpu_kernel_sanitize -lm
	$(CC) $(SANITIZE) tests/rounding_sanitize.c -o build/rounding_sanitize -lm
	build/cpu_kernel_sanitize
	build/rounding_sanitize

$(STAMP): pyproject.toml constraints.txt $(wildcard kernels/cpu/*.c kernels/cpu/*.h)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt torch
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-peers .venv-newest build dist *.egg-info kernels/cpu/*.so
