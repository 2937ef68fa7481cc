# `make train` and `make test` are all a newcomer needs; both make .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test test-ray test-cluster test-wheel lint docs clean

train: $(VENV)/installed
	$(RUN) -m mprd.train

test: $(VENV)/installed lint
	$(RUN) -m pytest -n auto

test-ray: $(VENV)/installed
	$(RUN) -m pytest -m ray -n 2 --dist loadfile --durations 12

# the wheel in an environment of its own; FULL=1 installs its dependencies there as well (minutes, 6 GB)
test-wheel: $(VENV)/installed
	MPRD_WHEEL_FULL=$(FULL) $(RUN) -m pytest -m wheel --durations 3

# as root, with `ip netns`, sshd, rsync and curl
test-cluster: $(VENV)/installed $(VENV)/installed-cluster
	$(RUN) -m pytest -m cluster

# what a machine of a cluster needs
$(VENV)/installed-cluster: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[cluster]"
	touch $@

# needs no network once $(VENV) is there
docs: $(VENV)/installed-docs
	$(RUN) -m sphinx -W --keep-going --quiet -b html docs docs/_build
	@echo "built: docs/_build/index.html"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache
