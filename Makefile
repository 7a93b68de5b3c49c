# The commands of README.md under short names. PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
# Inputs of `make fuzz` over all readers, the seed, and the number of the first one; mutants of `make mutants`.
N ?= 1000000
SEED ?= 0
START ?= 0
MUTANTS ?= 100
BIN := $(VENV)/bin

.PHONY: help venv install check docs site format test test-slow test-runtime resolve faults fuzz mutants fuzz-http soak endurance bulk images demo clean

help:
	@echo "make demo      install into $(VENV) and run the demo"
	@echo "make test      install into $(VENV) and run the fast tests"
	@echo "make test-slow install into $(VENV) and run the slow tests"
	@echo "make test-runtime  the runtime and its tests on Python 3.10 (PYTHON310), in $(VENV310)"
	@echo "make resolve   do the extras for a device have wheels for 64-bit Arm and Python 3.10? needs a network"
	@echo "make faults    install into $(VENV), kill every command that writes 300 times, and check what is left"
	@echo "make fuzz      read N mutated files with every reader (N=1000000 SEED=0 START=0), hours"
	@echo "make mutants   change the code at MUTANTS places, and count what no test notices"
	@echo "make fuzz-http requests made from the OpenAPI document, for SECONDS (60)"
	@echo "make soak      the server at twice its capacity, for MINUTES (10)"
	@echo "make endurance CAPTIONS (100000) through one scheduler"
	@echo "make bulk      kill bulk on 5,000 pictures, and measure its speed"
	@echo "make images    build the containers of IMAGES (cpu) with DOCKER (docker), and run doctor in each"
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

# The runtime and its tests on the Python of JetPack 6. Their bundles are exported there too, with the versions of torch
# and transformers that still run on it.
PYTHON310 ?= python3.10
VENV310 ?= .venv310
BIN310 := $(VENV310)/bin

$(VENV310)/.installed: pyproject.toml constraints.txt
	$(PYTHON310) -m venv $(VENV310)
	$(BIN310)/pip install -c constraints.txt -e '.[test]'
	$(BIN310)/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
	$(BIN310)/pip install -c constraints.txt transformers==5.20.2 onnx==1.23.2 onnxscript==0.7.2 safetensors==0.8.0
	touch $@

# The comparisons with transformers need 5.21, which runs on 3.11 and newer.
test-runtime: $(VENV310)/.installed
	$(BIN310)/pytest -n 2 --dist loadfile -m "not slow" -k "not transformers and not no_torch" tests/runtime tests/bundle tests/test_cli.py tests/test_public_face.py

resolve: $(VENV310)/.installed
	$(BIN310)/python benchmarks/resolve_device.py

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

# Downloads the base images and the packages. DOCKER may be podman; IMAGES=l4t is for a Jetson.
DOCKER ?= docker
IMAGES ?= cpu
images:
	for image in $(IMAGES); do \
	    $(DOCKER) build -f docker/Dockerfile.$$image -t blip2edge:$$image . && \
	    $(DOCKER) run --rm blip2edge:$$image doctor || exit 1; \
	done

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
	$(BIN)/python benchmarks/explain_pictures.py --write

site: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV310) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
