# One command each, on a fresh machine: sets up the environment in .venv if it is not there, then does the job.
#   make table1   results/table1.csv on the embedded digits      make test    the test suite
#   make tables   all six tables, each on its own preset         make lint    style, types, layers, workflow
#   make report   all of them as one HTML file                   make docs    the documentation as a site in site/
# Choose another preset or number of cores: make table1 PRESET=smoke CORES=1
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
PRESET ?=
CORES ?= all
WORKERS ?= 2
SETUP := .venv/installed-$(shell sha256sum pyproject.toml | cut -c1-16)
DOCS := $(SETUP:.venv/installed-%=.venv/docs-%)
RUN := source .venv/bin/activate &&
PYTEST := $(RUN) python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SNAKEMAKE := $(RUN) snakemake --cores $(CORES) $(if $(PRESET),--config preset=$(PRESET))

TABLES := table1 table2 table3 table4 table5 table6
.PHONY: help setup $(TABLES) deviations ours tables times report unlock test fast-test lint docs aot format dag bench plan
help:
	@sed -n '1,5p' Makefile | cut -c3-

setup: $(SETUP)
$(SETUP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	    "Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; say which: make PYTHON=/path/to/python3.11" % v)'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Setting up .venv (about 6 GB with torch, a few minutes) ..."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@rm -f .venv/installed-* && touch $@

$(TABLES) deviations ours: $(SETUP)
	@$(SNAKEMAKE) -- results/$@.csv
	@echo && cat results/$@.md

tables: $(SETUP)
	@$(SNAKEMAKE)

times: $(SETUP)
	@$(RUN) dmd2 times

unlock: $(SETUP)
	@$(SNAKEMAKE) --unlock

report: tables
	@$(SNAKEMAKE) --report results/report.html
	@echo "open results/report.html"

test: $(SETUP)
	@$(PYTEST)

fast-test: $(SETUP)
	@$(PYTEST) -m 'not slow'

lint: $(SETUP)
	@$(RUN) ruff check . && ruff format --check . && mypy && lint-imports && snakefmt --check Snakefile workflow \
	    && snakemake --lint && python -m dmd2_kernels.lint

$(DOCS): $(SETUP)
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@rm -f .venv/docs-* && touch $@

docs: $(DOCS)
	@$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build && echo "open site/index.html"

# Without --dtype fp16 too, whose code is bf16's but for the conversions.
aot: $(SETUP)
	@$(RUN) env -u TRITON_INTERPRET python -m dmd2_kernels.aot --arch 80,90,100 --dtype bf16,fp32 --check --jobs 2

format: $(SETUP)
	@$(RUN) ruff check --fix . ; ruff format . ; snakefmt Snakefile workflow

dag: $(SETUP)
	@$(SNAKEMAKE) --rulegraph mermaid-js -- results/table1.csv results/table3.csv

plan: $(SETUP)
	@$(RUN) dmd2 plan table1 table3 --preset $(or $(PRESET),digits)

bench: $(SETUP)
	@$(RUN) python -m dmd2_kernels.bench && python -m dmd2_kernels.plot results/bench/kernels.csv kernels/bench.svg \
	    && python -m dmd2.cost.bench --preset $(or $(PRESET),digits)
