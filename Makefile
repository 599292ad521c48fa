# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON names the interpreter (3.11 or later); PIPFLAGS goes to pip, e.g. for another package index.
PYTHON ?= python3
PIPFLAGS ?=
SPEC ?= experiments/digits.yaml
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow lint bench clean

demo: $(STAMP)
	$(BIN)/elbowroom run $(SPEC) --out runs/demo --overwrite
	-@$(BIN)/python -m webbrowser -t "file://$(CURDIR)/runs/demo/report.html" >/dev/null 2>&1

test: lint
	$(BIN)/python -m pytest -n 2 -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow or gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist src/*.egg-info

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(PIPFLAGS) -c constraints.txt -e ".[dev]"
	touch $@
