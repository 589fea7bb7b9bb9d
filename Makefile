# `make demo` and `make test` install what they need by themselves; the second time they start at once.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint format clean

demo: $(INSTALLED)  ## fine-tune, export, answer: the whole path in a few minutes
	$(RUN) -m bench.demo

test: $(INSTALLED)  ## every test that this machine can run; skipped ones say why
	$(RUN) -m pytest

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'qa_onnx needs Python 3.11 or later')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[cpu,train,export,bench,dev]"
	touch $@

clean:  ## the environment and what tools left; runs/ stays, models are in it
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
