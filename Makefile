PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One thread per process: the tests run in two, and threads that compete are slower than none.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: .venv demo test lint gate bench clean

.venv: $(STAMP)

# torch first and alone, so that a later step cannot replace it by another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/pyro-vae compare --pair vae --data digits

# pytest exits with an error (5) where no test was found.
test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gate: $(STAMP)
	$(BIN)/python -m tests.gate

bench: $(STAMP)
	@for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python "$$file" || exit 1; done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find pyro_vae models guides tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
