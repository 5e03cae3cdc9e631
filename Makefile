# Everything happens in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
METADATA := settings.ini setup.py pyproject.toml
DEMO := runs/demo
# Some machines forbid to keep bytecode; then every start would compile torch and diffusers again, twenty seconds each time.
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo app test test-long test-python test-notebooks readme clean-demo
.DELETE_ON_ERROR:

help:
	@echo 'make demo        fine-tune the shipped model on three rewards and measure it, into runs/demo: at most 20 minutes with the set-up'
	@echo 'make app         the panel on runs/, or on recorded runs, at http://127.0.0.1:7860; RUNS=folder takes another folder'
	@echo 'make test        the tests, as .ci/run calls them: about 20 minutes on two cores, after a set-up of about 3'
	@echo 'make test-long   the same with every method, model and number of processes: about 30 minutes'
	@echo 'make readme      write README.md from nbs/index.ipynb'
	@echo 'make clean-demo  forget the demo run, so that the next one starts afresh'

demo: .venv/.installed
	@echo
	@echo '== Demo (1 of 2): joint training on fairness, composition and preference; at most 12 minutes.'
	@echo '   An interrupted demo goes on where it was; "make clean-demo" starts afresh.'
	$(BIN)/drl train joint --out $(DEMO) --resume
	@echo
	@echo '== Demo (2 of 2): the tuned model against its base, same prompts and seeds; about 2 minutes.'
	$(BIN)/drl eval $(DEMO) --out $(DEMO)

app: .venv/.installed
	$(BIN)/drl app $(RUNS)

clean-demo:
	rm -rf $(DEMO)

test: test-python test-notebooks
	@echo '== All tests passed.'

test-long: export LONG = 1
test-long: test

test-python: .venv/.installed-dev
	@echo '== Tests (1 of 2): pytest, two processes; about $(if $(LONG),22,13) minutes.'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 tests

test-notebooks: .venv/.installed-dev
	@echo '== Tests (2 of 2): every notebook from top to bottom, two at a time, without the cells marked heavy; about 7 minutes.'
	OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py

readme: .venv/.installed-dev
	$(BIN)/python tests/readme.py

# A stamp is newer than the package's metadata when the environment is up to date.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: $(METADATA) | .venv/bin/python
	@echo '== Set-up: the package and what it needs, into .venv. About 3 minutes the first time (the wheel of torch is large), seconds later.'
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile -e .
	@touch $@

.venv/.installed-dev: $(METADATA) | .venv/bin/python
	@echo '== Set-up: the package, what it needs and what tests need, into .venv. About 3 minutes the first time (the wheel of torch is large), seconds later.'
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile -e '.[dev]'
	@touch .venv/.installed $@
