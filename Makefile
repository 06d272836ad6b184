# make demo: set up everything and answer a prompt through the mesh. make test: set up everything and run the tests.
# make test-nodes: those on Ray clusters of several nodes, and others that take long.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-nodes check audit format clean

demo: $(READY)
	$(BIN)/expertmesh demo

test: $(READY)
	$(BIN)/python -m pytest tests -m 'not long'

test-nodes: $(READY)
	$(BIN)/python -m pytest tests -m long

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

# Known vulnerabilities of what the lock pins; needs a service with advisories (SERVICE: pypi or osv).
SERVICE ?= pypi
audit:
	rm -rf build/audit
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -s $(SERVICE) -r requirements/cpu.lock; \
	  status=$$?; rm -rf build/audit; exit $$status

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
