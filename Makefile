# Every target is a few plain commands. PYTHON and VENV can be set: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
RECORDS := $(or $(BACKDOORLAB_RECORDS),record)
# Two waiting threads that spin slow each other down many times over on a busy machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test coverage test-processors docs tutorial gpu bench results clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# What is there already is kept and shown. The other methods of defense/ run on the same record in the same way.
demo: $(VENV)/installed
	[ -f $(RECORDS)/demo/record.json ] || $(RUN) attack/badnet.py --save_folder_name demo
	for name in asd bu dau ft ibau sau; do \
	    [ -f $(RECORDS)/demo/defense/$$name/seed0/result.json ] || $(RUN) defense/$$name.py --result_file demo || exit; done
	$(RUN) -m backdoorlab table demo --missing False

# The page's tests drive Chromium (Debian: apt-get install chromium chromium-driver) and are skipped without it.
test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile

$(VENV)/installed-docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

# The site, in site/: open site/index.html. Any warning is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(RUN) -m mkdocs build --strict

# Runs every command of the tutorial, and writes their output into its page; makes the notebook.
tutorial: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) docs/make/tutorial.py

# Nearly twice the processor time of the tests alone, so `make test` does without.
coverage: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile --cov --cov-report=term

# As other processors round, with one thread and two: half an hour each. ONLY="avx2-fp32" takes one of them.
test-processors: $(VENV)/installed-dev
	$(RUN) tests/processors.py $(if $(ONLY),--only $(ONLY))

# Fifteen minutes of one GPU: tests, then as much of the grid as fits. RUN=python3 where the packages are installed already.
gpu:
	$(RUN) performance/gpu_session.py $(GPU)

bench: $(VENV)/installed
	$(RUN) -m performance

# Tables, pictures and numbers of README.md and docs/ from docs/results/stored: seconds, and nothing is trained.
results: $(VENV)/installed
	$(RUN) performance/results.py

clean:
	rm -rf $(VENV) build dist site *.egg-info .coverage
