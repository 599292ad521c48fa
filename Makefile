# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON names the interpreter (3.11 or later); PIPFLAGS goes to pip, e.g. for another package index.
PYTHON ?= python3
PIPFLAGS ?=
SPEC ?= experiments/digits.yaml
BIN := .venv/bin
PYTHON312 ?= python3.12
BIN1 := .venv-arviz1/bin
STAMP1 := .venv-arviz1/.installed
BIN1M := .venv-arviz1-memory/bin
STAMP1M := .venv-arviz1-memory/.installed
BINB := .venv-bench/bin
STAMPB := .venv-bench/.installed
BINP := .venv-peers/bin
STAMPP := .venv-peers/.installed
TORCH ?= torch
STAMP := .venv/.installed
STAMPD := .venv/.installed-docs

.PHONY: demo docs test test-slow test-arviz1 test-peers test-newest lint bench clean FORCE

demo: $(STAMP)
	$(BIN)/elbowroom run $(SPEC) --out runs/demo --overwrite
	-@$(BIN)/python -m webbrowser -t "file://$(CURDIR)/runs/demo/report.html" >/dev/null 2>&1

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "slow or gpu"

# ArviZ 1.x (Python 3.12): the files of a run, without torch, give the same numbers as here; and all that is returned in memory.
test-arviz1: $(STAMP) $(STAMP1) $(STAMP1M)
	rm -rf build/arviz1 && mkdir -p build/arviz1
	$(BIN)/python tests/arviz1/expect.py build/arviz1
	$(BIN1)/python tests/arviz1/check.py build/arviz1
	$(BIN1M)/python -c "import arviz; assert arviz.__version__.startswith('1.'), arviz.__version__"
	$(BIN1M)/python -m pytest -q tests/analysis/test_arviz.py

# Each adapter of er.adapt against the peer's own package. The imports fail where a package is missing, which the tests would skip.
test-peers: $(STAMPP)
	$(BINP)/python -c "import scvi, pythae; from benchmarks.adapters import import_pyroved; import_pyroved()"
	PYTHONPATH=. $(BINP)/python -m pytest -q -W ignore tests/peers $(ARGS)

# The wheel, with the newest of all that it needs (no constraints.txt), in a fresh environment; the tests, in a copy, run on it.
test-newest:
	PIPFLAGS="$(PIPFLAGS)" tests/newest/run.sh "$(PYTHON)" "$(TORCH)" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages of docs/ and the docstrings, as build/docs/index.html; a warning, such as a dead link, ends it.
docs: $(STAMPD)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

docs/components.md: $(STAMP) FORCE
	$(BIN)/elbowroom components --markdown > $@.new && mv $@.new $@

docs/images/architecture.svg: $(STAMP) FORCE
	$(BIN)/python docs/architecture.py

# Ours and the peers side by side, into benchmarks/RESULTS.md; ARGS=--quick shows in minutes that everything runs.
bench: $(STAMPB)
	$(BINB)/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv .venv-arviz1 .venv-arviz1-memory .venv-bench .venv-peers build dist src/*.egg-info

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(PIPFLAGS) -c constraints.txt -e ".[dev]"
	touch $@

$(STAMP1): tests/arviz1/requirements.txt
	test -x $(BIN1)/python || $(PYTHON312) -m venv .venv-arviz1
	$(BIN1)/python -m pip install -q $(PIPFLAGS) -r tests/arviz1/requirements.txt
	touch $@

# The pins of constraints.txt, but for those of ArviZ.
$(STAMP1M): pyproject.toml constraints.txt
	test -x $(BIN1M)/python || $(PYTHON312) -m venv .venv-arviz1-memory
	grep -v '^arviz' constraints.txt > .venv-arviz1-memory/constraints.txt
	$(BIN1M)/python -m pip install -q $(PIPFLAGS) -c .venv-arviz1-memory/constraints.txt "arviz>=1,<2" -e ".[dev]"
	touch $@

$(STAMPB): pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(BINB)/python || $(PYTHON) -m venv .venv-bench
	$(BINB)/python -m pip install -q $(PIPFLAGS) -c constraints.txt -r benchmarks/requirements.txt -e .
	touch $@

# pyroVED brings torchvision for its plots, whose wheel on PyPI does not load beside a CPU torch: other packages would stumble on it.
$(STAMPP): pyproject.toml constraints.txt
	test -x $(BINP)/python || $(PYTHON) -m venv .venv-peers
	$(BINP)/python -m pip install -q $(PIPFLAGS) -c constraints.txt -e ".[peers]" pytest
	$(BINP)/python -c "import torchvision" 2>/dev/null || $(BINP)/python -m pip uninstall -q -y torchvision
	touch $@

$(STAMPD): $(STAMP)
	$(BIN)/python -m pip install -q $(PIPFLAGS) -c constraints.txt -e ".[docs]"
	touch $@
