# A convenience for Linux and macOS; README.md has the plain commands, which work on Windows too.
PYTHON ?= python3

.PHONY: install demo test lab lint

install:
	@$(PYTHON) tools/install.py

demo: install
	.venv/bin/pgolf demo

test: install
	@$(PYTHON) tools/install.py --test-tools
	.venv/bin/python -m pytest -q -n auto --dist loadfile

lab: install
	.venv/bin/jupyter lab notebooks

lint: install
	.venv/bin/ruff check
	.venv/bin/ruff format --check
