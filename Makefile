# make demo: install, train on the text that every Python carries, show what comes out.
# make test: install what the tests need, run the whole suite.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/newllm train quickstart --data builtin --batch-size 32 --max-steps 120 --validate-every-steps 20 --name demo
	$(VENV)/bin/newllm generate results/demo --prompt "the value of" --seed 1 --samples 2

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; assert (3, 11) <= v < (3, 14), f"newllm_lib needs Python 3.11 to 3.13, not {v[0]}.{v[1]}: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
