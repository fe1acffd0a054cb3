PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One thread per process: the tests run in two, and threads that compete are slower than none.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: .venv demo test lint gate bench speed docs clean

.venv: $(STAMP)

# torch first and alone, so that a later step cannot replace it by another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

demo: $(STAMP)
	$(ONE_THREAD) $(BIN)/pyro-vae compare --data digits --sites x \
		--pair vae -o latent=8 -o hidden=64,64 \
		--objective elbo:num_particles=10 \
		--objective mean_field:num_particles=10 \
		--objective iwae:num_particles=10 \
		--objective iwae:num_particles=10,estimator=dreg \
		--objective renyi:alpha=0.5,num_particles=10 \
		--seeds 0,1 --steps 5000 --batch-size 64 --jobs 2 --out runs/demo

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
	$(BIN)/python -m benchmarks.gradients
	$(BIN)/python -m benchmarks.interrupted
	$(BIN)/python -m benchmarks.memory

# Beside NumPyro, which nothing else needs. A few hours; wants a quiet machine.
speed: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.speed

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find pyro_vae models guides tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
