# PYTHON makes the environment: 3.11 to 3.13.
PYTHON ?= $(shell command -v python3.12 >/dev/null && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
ENV := .venv
RUN := $(ENV)/bin/python
# Test files side by side: much of XLA's compiling uses one core.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# Huge pages make large arrays on CPU 1.3 to 2 times faster; other systems ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: env quickstart check test lint libtpu

env: $(ENV)/done

$(ENV)/done: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear $(ENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Trains on real handwritten digits, then evaluates the best checkpoint.
quickstart: env
	mkdir -p runs/digits
	@start=$$(date +%s); \
	$(RUN) train.py --config=configs/digits.py --workdir=runs/digits && \
	trained=$$(date +%s) && echo "train.py took $$((trained - start)) s" && \
	$(RUN) eval.py --config=configs/digits.py --workdir=runs/digits > runs/digits/eval.txt && \
	sed '$$d' runs/digits/eval.txt && echo "eval.py took $$(($$(date +%s) - trained)) s" && \
	tail -n 1 runs/digits/eval.txt

# What to run while working.
check: lint
	$(RUN) -m pytest $(WORKERS) -m "not slow"

# Everything.
test: lint
	$(RUN) -m pytest $(WORKERS) --durations=40

# The compiler of TPUs, for the test that rehearses a pod without one.  Not in the
# environment: there JAX would look for a TPU in every program.
libtpu: env
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .cache/libtpu libtpu==0.0.52

lint: env
	$(ENV)/bin/ruff check .
	$(ENV)/bin/ruff format --check .
