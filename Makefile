# All of it happens in .venv and demo/. Another Python: make clean, then make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix clean

help:
	@echo 'make demo    landmarks, training, verification on real faces that come with a package; a few minutes'
	@echo 'make test    run the tests'
	@echo 'make test-matrix   the same as on four kinds of machine: this one, without bf16, with it, without a C compiler'
	@echo 'make clean   remove .venv and demo/; cache/ and runs/ stay'

demo: $(VENV)/with-demo
	$(VENV)/bin/python tools/demo.py

test: $(VENV)/with-tests
	$(VENV)/bin/python -m pytest

# One after the other, whatever fails, so that the last lines say what each kind of machine makes of the tests.
test-matrix: $(VENV)/with-tests
	@status=0; for kind in FACES_BF16= FACES_BF16=0 FACES_BF16=1 CC=false; do \
	  echo "== $$kind"; env $$kind $(VENV)/bin/python -m pytest || status=1; \
	done; exit $$status

clean:
	rm -rf $(VENV) demo .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is there when its requirements are installed, so nothing is installed twice; an interrupted
# attempt is made again over what it left.
$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "name one by: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: $(PYTHON) can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@$(PIP) -r requirements.txt || { $(NO_PIP); }
	@# opencv-python needs the system's libGL, which servers and containers often lack; the headless build does not.
	@$(VENV)/bin/python -c 'import cv2' 2>/dev/null || { \
	  echo 'no libGL on this machine: taking opencv-python-headless'; \
	  $(PIP) --force-reinstall --no-deps 'opencv-python-headless>=4.11' || { $(NO_PIP); }; }
	@touch $@

$(VENV)/with-tests: $(VENV)/ready requirements-dev.txt
	@$(PIP) -r requirements-dev.txt || { $(NO_PIP); }
	@touch $@

$(VENV)/with-demo: $(VENV)/ready requirements-demo.txt
	@$(PIP) --no-deps -r requirements-demo.txt || { $(NO_PIP); }
	@touch $@

NO_PIP = echo 'make: pip could not install all that is needed (see above); check the network and that 8 GB of disk' \
  'are free, then run make again' >&2; exit 1
