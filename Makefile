# make quickstart   from nothing to a trained model on this machine's own text
# make test         the whole test suite on a CPU
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: install quickstart test lint clean

install: $(VENV)/.installed

# torch first: the pin then keeps every later requirement from bringing another build.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) tools/check_python.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: install
	$(BIN)/megatron-scratch data prepare experiment=quickstart
	$(BIN)/megatron-scratch train experiment=quickstart
	$(BIN)/megatron-scratch eval $(RUN)
	@echo; echo "--- a sample ---"
	$(BIN)/megatron-scratch generate $(RUN) prompt="def main(" max_new_tokens=120 temperature=0.7 top_p=0.9

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile # a file's tests share what they train

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
