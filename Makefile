# make demo: set up everything and answer a prompt through the mesh. make test: set up everything and run all tests.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check format clean

demo: $(READY)
	$(BIN)/expertmesh demo

test: $(READY)
	$(BIN)/python -m pytest tests

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): requirements/cpu.lock pyproject.toml $(wildcard routing/native/*.[ch])
	@echo "setting up .venv (about 4 GB, a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv build *.egg-info src/*.egg-info routing/native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
