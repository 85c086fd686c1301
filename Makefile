# make demo: install, train on the text that every Python carries, show what comes out.
# make test: install what the tests need, run the suite but for what the next three do.
# make test-slow: what of the suite takes longer than make test has time for.
# make test-notebooks: every notebook without a browser, twice in a row, here and with Colab's versions; the set-up cell.
# make notebooks: into dist/, the notebooks with the library inside: each needs no other file.
# make test-browser: the notebooks in JupyterLab and in classic Notebook (Colab's versions), in a headless Chromium.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo notebooks test test-slow test-notebooks test-browser lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/newllm train quickstart --data builtin --batch-size 32 --max-steps 120 --validate-every-steps 20 --name demo
	$(VENV)/bin/newllm generate results/demo --prompt "the value of" --seed 1 --samples 2

notebooks: $(VENV)/.installed-dev
	$(VENV)/bin/python notebooks/tidy.py --standalone dist

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n 2

test-slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n 2 -m slow

test-notebooks: export NEWLLM_JUPYTER = $(abspath $(VENV))/bin/jupyter
test-notebooks: export NEWLLM_JUPYTER_COLAB = $(abspath $(VENV)-colab)/bin/jupyter
test-notebooks: $(VENV)/.installed-dev $(VENV)-colab/.installed
	$(VENV)/bin/python -m pytest -n 2 tests/test_notebooks.py tests/test_setup_cell.py tests/test_standalone.py tests/browser/test_headless.py

test-browser: export NEWLLM_JUPYTER_COLAB = $(abspath $(VENV)-colab)/bin/jupyter
test-browser: export NEWLLM_JUPYTER_LAB = $(abspath $(VENV)-jupyterlab)/bin/jupyter
test-browser: $(VENV)/.installed-dev $(VENV)-colab/.installed $(VENV)-jupyterlab/.installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadscope tests/browser/test_stacks.py tests/browser/test_in_a_browser.py tests/browser/test_panel_in_a_browser.py tests/browser/test_hostile.py

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) $(VENV)-colab $(VENV)-jupyterlab build *.egg-info

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; assert (3, 11) <= v < (3, 14), f"newllm_lib needs Python 3.11 to 3.13, not {v[0]}.{v[1]}: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# A Jupyter of its own for each list of versions in tests/browser.
$(VENV)-%/.installed: tests/browser/%.txt constraints.txt setup.py
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet --disable-pip-version-check --requirement $< --editable .
	touch $@
