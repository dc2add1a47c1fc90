# Everything runs in .venv, installed from the committed lock. Needs Python 3.11+, make and the package registries.
PYTHON ?= python3
BIN := .venv/bin

# With it set, each of the suite's four hundred processes would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test proof bench lint generated lock clean
.DEFAULT_GOAL := demo

.venv/installed: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "creditstream needs Python 3.11 or newer; this is $$($(PYTHON) -V). Set PYTHON=python3.12, say." >&2; exit 1; }
	@echo "installing into .venv, once: 1.3 GB, 1 to 2 minutes" >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/installed  ## a real Kafka, a real worker, a real ClickHouse engine, for 30 s
	@$(BIN)/creditstream demo

test: .venv/installed  ## the whole test suite, on real Kafka and real chDB
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

proof: .venv/installed  ## 210 kills, cuts and stops of a pipeline at work, and the count of what was lost: 20 to 30 minutes
	@$(BIN)/python -m tests.proof

bench: .venv/installed  ## throughput, latency of limits, the gate, overshoot, the views: about 20 minutes
	@$(BIN)/python -m bench.throughput
	@$(BIN)/python -m bench.limits
	@$(BIN)/python -m bench.gate
	@$(BIN)/python -m bench.overshoot
	@$(BIN)/python -m bench.views

lint: .venv/installed  ## style and strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

generated: .venv/installed  ## JSON Schemas and AsyncAPI, after a change of the schemas
	$(BIN)/python -m schemas.generate

lock: .venv/installed  ## resolve the locks again, after a change of pyproject.toml
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --generate-hashes --no-emit-index-url --no-header -q -o requirements-dev.lock
	$(BIN)/uv pip compile pyproject.toml --extra worker --universal --generate-hashes --no-emit-index-url --no-header -q -c requirements-dev.lock -o requirements-worker.lock

clean:  ## remove the environment and all embedded state
	rm -rf .venv .creditstream
