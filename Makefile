# A convenience for Linux and macOS; docs/install.md has the plain commands, which work on Windows too.
PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-long lab lint types docs

install:
	@$(PYTHON) tools/install.py

demo: install
	.venv/bin/pgolf demo

test: install
	$(PYTEST) -m "not slow"

test-long: install
	@$(PYTHON) tools/install.py --test-tools
	$(PYTEST) -m slow

lab: install
	.venv/bin/jupyter lab notebooks

lint: install
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports --no-logo
	.venv/bin/python tools/check_style.py

types: install
	.venv/bin/mypy

docs: install
	@.venv/bin/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
