# Everything happens in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that a set-up installs: those that were tested. Empty: the newest.
CONSTRAINTS ?= assets/constraints.txt
METADATA := settings.ini setup.py pyproject.toml $(CONSTRAINTS)
DEMO := runs/demo
# Some machines forbid to keep bytecode; then every start would compile torch and diffusers again, twenty seconds each time.
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help course demo app test test-long test-quick lint docs test-python test-notebooks test-oldest test-newest renew-constraints readme pictures clean-demo
.DELETE_ON_ERROR:

help:
	@echo 'make course      JupyterLab on the first of fourteen lessons: a reward of your own changes images in ten minutes'
	@echo 'make demo        fine-tune the shipped model on three rewards and measure it, into runs/demo: at most 20 minutes with the set-up'
	@echo 'make app         the panel on runs/, or on recorded runs, at http://127.0.0.1:7860; RUNS=folder takes another folder'
	@echo 'make test        the tests, as .ci/run calls them: about 25 minutes on two cores, after a set-up of about 3'
	@echo 'make test-quick  the quickest tests of every room: under a minute'
	@echo 'make lint        ruff and mypy on the package, as make test calls them: half a minute'
	@echo 'make test-long   the same with every method, model and number of processes: about 40 minutes'
	@echo 'make test-newest the tests on the newest version of everything, in an environment of its own: tells early what will break'
	@echo 'make test-oldest the tests of models, LoRA and training on the oldest versions that settings.ini allows'
	@echo 'make renew-constraints  test-newest, and if all pass, assets/constraints.txt anew: what set-ups install'
	@echo 'make docs        the notebooks as a site, _docs/html/index.html: about a minute'
	@echo 'make readme      write README.md from nbs/index.ipynb'
	@echo 'make pictures    the pictures of README.md anew, from the shipped runs: about a minute, in Chromium'
	@echo 'make clean-demo  forget the demo run, so that the next one starts afresh'

demo: $(VENV)/.installed
	@echo
	@echo '== Demo (1 of 2): joint training on fairness, composition and preference; at most 12 minutes.'
	@echo '   An interrupted demo goes on where it was; "make clean-demo" starts afresh.'
	$(BIN)/drl train joint --out $(DEMO) --resume
	@echo
	@echo '== Demo (2 of 2): the tuned model against its base, same prompts and seeds; about 2 minutes.'
	$(BIN)/drl eval $(DEMO) --out $(DEMO)

# The root is this folder, so that a lesson's links into the reference open; the address that is printed opens the lesson, too.
# No news, no updates: what is here works offline.
LESSON ?= nbs/course/01_ten_minute_win.ipynb
course: $(VENV)/.installed-course
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/$(LESSON) \
		--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

app: $(VENV)/.installed
	$(BIN)/drl app $(RUNS)

clean-demo:
	rm -rf $(DEMO)

test: lint test-python test-notebooks
	@echo '== All tests passed.'

test-long: export LONG = 1
test-long: test

TESTS ?= tests
test-python: $(VENV)/.installed-dev
	@echo '== Tests (1 of 2): pytest, two processes; about $(if $(LONG),30,18) minutes.'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 $(TESTS)

test-notebooks: $(VENV)/.installed-dev
	@echo '== Tests (2 of 2): every notebook from top to bottom, two at a time, without the cells marked heavy; about 7 minutes.'
	OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py

# The longest line that is allowed; an empty one allows any.
LINE ?= 140
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check drl_toolkit tests setup.py $(if $(LINE),--extend-select E501 --line-length $(LINE) --extend-exclude _modidx.py)
	$(BIN)/python -m mypy

test-quick: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --quick $$($(BIN)/python tests/tiers.py)

docs: $(VENV)/.installed-docs
	$(BIN)/python tests/docs.py

readme: $(VENV)/.installed-dev
	$(BIN)/python tests/readme.py

pictures: $(VENV)/.installed-dev
	$(BIN)/python tests/pictures.py

# What settings.ini allows, at both ends. Each has an environment of its own and begins with an empty one.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS= EXTRAS=$(ALL)

NEW := .venv-newest/constraints.txt
renew-constraints: test-newest
	.venv-newest/bin/python tests/versions.py tested > $(NEW)
	mv $(NEW) assets/constraints.txt
	@echo '== assets/constraints.txt holds the versions that have just passed.'

test-oldest:
	rm -rf .venv-oldest
	$(MAKE) test-python VENV=.venv-oldest CONSTRAINTS=tests/constraints-oldest.txt EXTRAS=$(ALL) TESTS='tests/sampling tests/rewards/test_alignment.py tests/emoji/test_tiny.py tests/training/test_trainer.py tests/project/test_install.py'

# A stamp is newer than the package's metadata and the tested versions when the environment is up to date.
EXTRAS ?= panel,widgets,dev
ALL := panel,widgets,data,ocr,dev
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(METADATA) | $(BIN)/python
	@echo '== Set-up: the package and what it needs, into $(VENV). About 3 minutes the first time (the wheel of torch is large), seconds later.'
	$(PIP_INSTALL) -e '.[panel,widgets]'
	@touch $@

$(VENV)/.installed-dev: $(METADATA) | $(BIN)/python
	@echo '== Set-up: the package, what it needs and what tests need, into $(VENV). About 3 minutes the first time (the wheel of torch is large), seconds later.'
	$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-course: $(METADATA) | $(BIN)/python
	@echo '== Set-up: the package, JupyterLab and what they need, into $(VENV). About 3 minutes the first time (the wheel of torch is large), seconds later.'
	$(PIP_INSTALL) -e '.[widgets,course]'
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' > $(VENV)/share/jupyter/lab/settings/overrides.json
	@touch $@

$(VENV)/.installed-docs: $(METADATA) | $(BIN)/python
	$(PIP_INSTALL) -e '.[panel,widgets,docs]'
	@touch $(VENV)/.installed $@
