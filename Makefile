# make demo: everything from set-up to the report.  make test: set-up and every test;
# make test-all: the same for every family of models.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DIGEST := $(shell cat pyproject.toml Cargo.toml Makefile | cksum | tr ' ' '-')
RUST_SOURCES := $(shell find rust -name '*.rs') Cargo.toml Cargo.lock pyproject.toml
PY_ENV := PATH="$(abspath $(BIN)):$$PATH" VIRTUAL_ENV="$(abspath $(VENV))" HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE PIP_QUIET=1

.PHONY: demo test test-all dev fmt lint types bench docs ci clean

demo: $(VENV)/.installed
	$(PY_ENV) moecollab demo --out demo-run --overwrite

test: $(VENV)/.developed
	cargo test --quiet
	$(PY_ENV) python -m pytest

# The same, with every family of models instead of a spread of them.
test-all: $(VENV)/.developed
	cargo test --quiet
	$(PY_ENV) python -m pytest --all-families

dev: $(VENV)/.developed

# An environment for users: the package and what it needs.
$(VENV)/.environment-$(DIGEST):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	command -v cargo >/dev/null || { echo "Rust is needed: https://rustup.rs"; exit 1; }
	rm -f $(VENV)/.environment-* $(VENV)/.installed $(VENV)/.developed $(VENV)/.dev-tools
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'maturin>=1.9.4,<2'
	touch $@

$(VENV)/.installed: $(VENV)/.environment-$(DIGEST) $(RUST_SOURCES)
	$(PY_ENV) maturin develop --release --quiet
	touch $@

# The same with what the tests need.
$(VENV)/.developed: $(VENV)/.environment-$(DIGEST) $(RUST_SOURCES)
	$(PY_ENV) maturin develop --release --quiet --extras dev
	touch $@ $(VENV)/.installed

fmt: $(VENV)/.developed
	cargo fmt
	$(PY_ENV) ruff format python tests benches
	$(PY_ENV) ruff check --fix python tests benches

lint: $(VENV)/.developed
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	$(PY_ENV) ruff format --check python tests benches
	$(PY_ENV) ruff check python tests benches

types: $(VENV)/.developed
	$(PY_ENV) mypy
	$(PY_ENV) python -m mypy.stubtest moecollab._core

bench: $(VENV)/.developed
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(PY_ENV) python -m pytest benches --benchmark-enable --benchmark-only

docs: $(VENV)/.developed
	$(PY_ENV) python tests/make_docs.py

ci: lint types test

clean:
	rm -rf $(VENV) target demo-run
