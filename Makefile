# The commands of README.md under short names. PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
# Inputs of `make fuzz` over all readers, the seed, and the number of the first one; mutants of `make mutants`.
N ?= 1000000
SEED ?= 0
START ?= 0
MUTANTS ?= 100
BIN := $(VENV)/bin

.PHONY: help venv install check docs site format test test-slow faults fuzz mutants fuzz-http soak endurance bulk demo clean

help:
	@echo "make demo      install into $(VENV) and run the demo"
	@echo "make test      install into $(VENV) and run the fast tests"
	@echo "make test-slow install into $(VENV) and run the slow tests"
	@echo "make faults    install into $(VENV), kill every command that writes 300 times, and check what is left"
	@echo "make fuzz      read N mutated files with every reader (N=1000000 SEED=0 START=0), hours"
	@echo "make mutants   change the code at MUTANTS places, and count what no test notices"
	@echo "make fuzz-http requests made from the OpenAPI document, for SECONDS (60)"
	@echo "make soak      the server at twice its capacity, for MINUTES (10)"
	@echo "make endurance CAPTIONS (100000) through one scheduler"
	@echo "make bulk      kill bulk on 5,000 pictures, and measure its speed"
	@echo "make check     ruff, mypy --strict, import-linter"
	@echo "make docs      write the tables, pages and pictures of docs/ that come from code"
	@echo "make site      build docs/ as a site in site/"
	@echo "make format    let ruff mend what it can"
	@echo "make install   install everything for development into $(VENV)"
	@echo "make clean     remove $(VENV) and the caches"

# A finished install leaves a stamp, newer than the two files that decide what is installed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

venv install: $(VENV)/.installed

demo:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[demo]'
	$(BIN)/blip2edge demo

test: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist loadfile -m slow

# KILLS and SEED choose other runs; they take about an hour on two cores.
KILLS ?= 300
faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults --kills $(KILLS) --seed $(SEED) --json benchmarks/results/faults.json

# A run with another SEED or START reads other files; the tables of several runs are added by --merge.
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz.run --inputs $(N) --least 2000 --seed $(SEED) --start $(START) --json fuzz.json --keep fuzz-findings

mutants: $(VENV)/.installed
	$(BIN)/python -m tests.mutants --mutants $(MUTANTS) --seed $(SEED) --json mutants.json

# BUNDLE is the bundle of these three; the default is made from the miniature checkpoint.
BUNDLE ?= $(VENV)/miniature
SECONDS ?= 60
MINUTES ?= 10
CAPTIONS ?= 100000

$(VENV)/miniature: $(VENV)/.installed
	$(BIN)/blip2edge export examples/checkpoint -o $@

fuzz-http: $(BUNDLE)
	$(BIN)/python benchmarks/fuzz_http.py $(BUNDLE) --seconds $(SECONDS) --json benchmarks/results/fuzz-http.json

soak: $(BUNDLE)
	$(BIN)/python benchmarks/soak.py overload $(BUNDLE) --minutes $(MINUTES) --json benchmarks/results/soak.json

endurance: $(BUNDLE)
	$(BIN)/python benchmarks/soak.py endurance $(BUNDLE) --captions $(CAPTIONS) --json benchmarks/results/endurance.json

bulk: $(BUNDLE)
	$(BIN)/python benchmarks/bulk_kills.py $(BUNDLE) --json benchmarks/results/bulk-kills.json
	$(BIN)/python benchmarks/bulk_speed.py $(BUNDLE) --json benchmarks/results/bulk-speed.json

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

docs: $(VENV)/.installed
	$(BIN)/python benchmarks/models_table.py --write docs/models.md
	$(BIN)/python benchmarks/side_files_table.py --write docs/checkpoints.md
	$(BIN)/python benchmarks/recipe_keys.py --write docs/training.md
	$(BIN)/python benchmarks/chat_keys.py --write docs/serving.md
	$(BIN)/python benchmarks/plan_page.py --write docs/plan.md
	$(BIN)/python benchmarks/command_pages.py --write
	$(BIN)/python benchmarks/mathematics_pictures.py --write

site: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
