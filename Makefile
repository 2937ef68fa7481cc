# `make train` and `make test` are all a newcomer needs; both make .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test test-ray test-cluster lint clean

train: $(VENV)/installed
	$(RUN) -m mprd.train

test: $(VENV)/installed lint
	$(RUN) -m pytest -n auto

test-ray: $(VENV)/installed
	$(RUN) -m pytest -m ray --durations 12

# as root, with `ip netns`, sshd, rsync and curl
test-cluster: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[cluster]"
	$(RUN) -m pytest -m cluster

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
