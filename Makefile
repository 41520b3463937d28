# One environment, made on first use and kept in step with the files that say what is in it.
# `make PYTHON=python3.12 test` takes another Python, `make VENV=/tmp/env test` another place.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
NB ?= $(sort $(wildcard nbs/[0-9]*.ipynb nbs/*/*.ipynb)) nbs/results.ipynb nbs/index.ipynb

DEMO_PRETRAIN = $(RUN)/simclr pretrain --recipe solar_cells --out runs/demo --overwrite
DEMO_EVALUATE = $(RUN)/simclr evaluate runs/demo solar_cells --label-fractions 0.01,0.1,1 --seeds 0,1,2,3,4

help:  ## Say what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1~/p' Makefile | awk -F~ '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/.with-demo  ## Pretrain on pictures of solar cells (about 15 minutes on two slow cores), evaluate, draw
	$(DEMO_PRETRAIN)
	$(DEMO_EVALUATE)

test: $(VENV)/.with-dev  ## Check the tree, run every notebook and every test (FLAGS="slow cuda" adds those cells)
	@$(RUN)/python tests/gate.py $(FLAGS)
	@git rev-parse HEAD > $(VENV)/.tested

lint: $(VENV)/.with-dev  ## What ruff and codespell find
	@$(RUN)/python tools/lint.py

lowest: $(VENV)/.with-lowest  ## The tests with the lowest versions that settings.ini allows, in an environment of its own
	@PIP_CONSTRAINT=$(abspath $(VENV)/lowest.txt) $(MAKE) VENV=$(VENV)-lowest test

findings: $(VENV)/.with-dev  ## Run every findings/*.sh, one after the other, and say which of them hold
	@$(RUN)/python tools/findings.py

release: $(VENV)/.with-dev  ## Check, test, build and tag the version in simclr_nb/__init__.py; nothing is sent
	@$(RUN)/python tools/release.py --tested $(VENV)/.tested

quick: $(VENV)/.with-dev  ## Check the tree and what concerns your changes, without processes (two minutes at most)
	@$(RUN)/python tests/gate.py --quick $(FLAGS)

docs: $(VENV)/.with-dev  ## Build the docs site in _docs and check its links
	@$(RUN)/python tools/docs.py

notebooks: $(VENV)/.with-dev  ## Run every notebook in place, slow cells too, then export (NB=nbs/04_ntxent.ipynb: one)
	$(RUN)/nbdev-export
	PYTHONWARNINGS='ignore::FutureWarning,ignore:IProgress not found' $(RUN)/jupyter nbconvert --to notebook --execute --inplace $(NB)
	$(RUN)/python tools/outputs.py $(NB)
	$(RUN)/nbdev-clean
	$(RUN)/nbdev-export
	$(MAKE) readme

readme: $(VENV)/.with-dev  ## Make README.md from nbs/index.ipynb
	@$(RUN)/python tools/readme.py

bench: $(VENV)/.with-bench  ## Measure against other libraries
	@for file in $(sort $(wildcard bench/*.py)); do $(RUN)/python $$file || exit 1; done

clean:  ## Remove what was built; the environment and runs/ stay
	rm -rf build dist _docs _proc *.egg-info .pytest_cache
	find simclr_nb tests tools -name __pycache__ -prune -exec rm -rf {} +

QUIET := $(if $(wildcard $(RUN)/python),-q)
with-demo = demo
with-dev = dev,docs
with-bench = demo,bench
$(VENV)/.with-%: settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and \
	    'simclr_nb needs Python 3.10 or newer and $(PYTHON) is %d.%d: try make PYTHON=python3.12' % v)"
	@echo "Setting up $(VENV); the first time this downloads PyTorch and takes a few minutes."
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install $(QUIET) --upgrade pip
	$(RUN)/python -m pip install $(QUIET) -e '.[$(with-$*)]'
	@touch $@

$(VENV)/.with-lowest: settings.ini tools/lowest.py
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -q uv
	$(RUN)/python tools/lowest.py > $(VENV)/lowest.txt
	@touch $@

.PHONY: help demo test quick lint lowest findings release docs notebooks readme bench clean
