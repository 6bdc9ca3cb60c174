# make quickstart   the tutorial's layer in five stages, timed and checked   (ARGS="--hidden 512 ..." passes flags on)
# make test         format, lint, types, tests
# Both set up $(VENV) first. PY=python3 uses an environment that you already have instead, and installs nothing.
PYTHON ?= python3
VENV ?= .venv
ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# Two test processes share the cores; torch's own threads would only get in their way.
JOBS ?= 2
test: export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check
quickstart: $(READY)
	$(PY) -m overdrive.cli quickstart $(ARGS)

test: check
	$(PY) -m pytest -n $(JOBS) $(ARGS)

check: $(READY)
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m pyright --pythonpath "$$(command -v $(PY))"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e '.[cli,test]'
	touch $@
