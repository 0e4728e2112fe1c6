# Everything happens in .venv, .venv-oldest and demo/. For another Python: make clean, then make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
# Two processes, unless there is only one core. More would take much memory: each has up to 3 GB.
TWO := -n auto --maxprocesses 2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-oldest fuzz reproduce both-sets benchmarks clean

help:
	@echo 'make demo         landmarks, training and evaluation on faces that come with a package; a few minutes'
	@echo 'make test         run the tests'
	@echo 'make lint         check the style rules'
	@echo 'make test-oldest  the tests with the oldest supported version of every package'
	@echo 'make reproduce CASIA=DIR LFW=DIR    train both methods by the default recipe and evaluate them on LFW'
	@echo 'make benchmarks [LFW=DIR]           run the benchmarks that need no data, or all of them'
	@echo 'make fuzz         damaged files for every reader, for SECONDS=3600; findings go to runs/fuzz'
	@echo 'make clean        remove the virtual environments and demo/; cache/ and runs/ stay'

demo: $(VENV)/with-demo
	$(VENV)/bin/python tools/demo.py

test: $(VENV)/with-tests
	$(VENV)/bin/python -m pytest $(TWO)

lint: $(VENV)/with-tests
	$(VENV)/bin/python -m ruff check .

# The lower bounds in the requirements files, installed exactly.
test-oldest:
	@$(MAKE) --no-print-directory VENV=.venv-oldest BOUND="sed 's/>=/==/'" test

SECONDS ?= 3600
fuzz: $(VENV)/with-tests
	$(VENV)/bin/python tests/fuzz/run.py --seconds $(SECONDS)

# Interrupted at any moment, the same command continues. ARGS are further options of casia_train.py.
reproduce: both-sets $(VENV)/ready
	@$(VENV)/bin/python tools/reproduce.py --casia "$(CASIA)" --lfw "$(LFW)" $(NPROC:%=--processes %) $(ARGS)

both-sets:
	@test -n "$(CASIA)" && test -n "$(LFW)" || { \
	  echo 'make: pass both sets: make reproduce CASIA=DIR LFW=DIR' >&2; exit 2; }

# Half an hour on two cores with LFW=DIR, the folder of LFW, whose landmarks mtcnn/lfw_landmark.py has written.
benchmarks: $(VENV)/with-benchmarks
	@trap 'exit 130' INT; \
	bench() { echo; echo "$$ python benchmarks/$$*"; $(VENV)/bin/python benchmarks/"$$@" || failed="$$failed $$1"; }; \
	bench loader.py; \
	bench throughput.py --batch-size 64 --steps 4 --warm-up 2 --device cpu; \
	bench training_step.py --turns 8; \
	bench training_step.py --turns 8 --precision float32; \
	bench training_step.py --turns 8 --method sphereFace; \
	bench training_step.py --turns 4 --batch-size 256; \
	bench training_step.py --turns 4 --batch-size 256 --method sphereFace; \
	if test -n "$(LFW)"; then \
	  bench mtcnn.py --lfw "$(LFW)" --collages 24; \
	  bench mtcnn.py --lfw "$(LFW)"; \
	  bench lfw_eval.py --lfw "$(LFW)" --pairs 600 --turns 2; \
	else echo 'skipped, because they need LFW=DIR: mtcnn.py, lfw_eval.py'; fi; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

clean:
	rm -rf .venv .venv-oldest demo .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file marks what is installed, so nothing is installed twice; an interrupted installation is repeated.
BOUND ?= cat
$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "choose another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: $(PYTHON) can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@$(BOUND) requirements.txt > $(VENV)/requirements.txt
	@$(PIP) -r $(VENV)/requirements.txt || { $(NO_PIP); }
	@# opencv-python needs the system's libGL, which servers and containers often lack; the headless build does not.
	@$(VENV)/bin/python -c 'import cv2' 2>/dev/null || { \
	  echo 'libGL is missing here: installing opencv-python-headless'; \
	  $(PIP) --force-reinstall --no-deps "$$(sed -n 's/^opencv-python/&-headless/; s/ *#.*//; /headless/p' \
	    $(VENV)/requirements.txt)" || { $(NO_PIP); }; }
	@touch $@

$(VENV)/with-tests: $(VENV)/ready requirements-dev.txt
	@$(BOUND) requirements-dev.txt > $(VENV)/requirements-dev.txt
	@$(PIP) -r $(VENV)/requirements-dev.txt || { $(NO_PIP); }
	@touch $@

$(VENV)/with-demo: $(VENV)/ready requirements-demo.txt
	@$(PIP) --no-deps -r requirements-demo.txt || { $(NO_PIP); }
	@touch $@

$(VENV)/with-benchmarks: $(VENV)/ready requirements-benchmarks.txt
	@grep -v == requirements-benchmarks.txt > $(VENV)/requirements-benchmarks.txt
	@{ $(PIP) -r $(VENV)/requirements-benchmarks.txt && $(PIP) --no-deps -r requirements-benchmarks.txt; } || { $(NO_PIP); }
	@touch $@

NO_PIP = echo 'make: pip could not install the requirements (see above); check the network and that 8 GB of disk' \
  'space are free, then run make again' >&2; exit 1
