# `make demo` and `make test` do all the set-up themselves.
PYTHON = .venv/bin/python

.PHONY: env demo test test-unit test-dist test-e2e test-gpu lint bench chaos clean

env:
	@cluster/bootstrap.sh --tests

demo:
	@cluster/bootstrap.sh
	@$(PYTHON) -m jobs.demo

test: env
	@$(PYTHON) -m pytest -q tests/unit tests/dist tests/e2e --durations=15

test-unit test-dist test-e2e test-gpu: test-%: env
	@$(PYTHON) -m pytest -q tests/$* --durations=10

lint: env
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

bench: env
	@for file in tests/bench/bench_*.py; do \
		echo "== $$(basename $$file .py)"; $(PYTHON) -m tests.bench.$$(basename $$file .py) || exit 1; done

chaos: env
	@$(PYTHON) -m tests.chaos
	@$(PYTHON) -m pytest -q tests/chaos

clean:
	rm -rf work
