# Every target is a few plain commands, printed in README.md too. PYTHON and VENV can be set: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Two waiting threads that spin slow each other down many times over on a busy machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test bench clean

$(VENV)/installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(RUN) attack/badnet.py --save_folder_name demo --overwrite True
	for defense in defense/*.py; do $(RUN) $$defense --result_file demo || exit; done
	$(RUN) -m backdoorlab table demo

# The page's tests drive Chromium (Debian: apt-get install chromium chromium-driver) and are skipped without it.
test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile

bench: $(VENV)/installed
	$(RUN) -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info
