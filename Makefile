# `make` alone lists the targets. All of them set up .venv first where they need it.
PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup tools demo test test-fast check bench clean

help: ## list the targets
	@echo "vllm-compress: compress a model, serve it with vLLM, measure both"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv, about two minutes once, then nothing
	@deploy/setup.sh

tools: ## Prometheus, nginx and Chromium for the tests of deploy/
	@deploy/test-tools.sh

demo: setup ## compress a small model, serve it, ask it, read its metrics
	@$(PYTHON) -m vllm_compress.demo

test: setup tools ## all tests, those that start vLLM servers too
	@$(PYTHON) -m pytest tests -m "not alone" --numprocesses 2 --dist loadfile --no-loadscope-reorder
	@$(PYTHON) -m pytest $$(grep -rl --include='test_*.py' 'mark\.alone' tests) -m alone

test-fast: setup ## the tests that take seconds
	@$(PYTHON) -m pytest tests -m "not slow"

check: setup ## lint, formatting, types, layers of imports
	@echo "ruff check"  && $(PYTHON) -m ruff check .
	@echo "ruff format" && $(PYTHON) -m ruff format --check .
	@echo "mypy"        && $(PYTHON) -m mypy
	@echo "imports"     && .venv/bin/lint-imports --no-logo

bench: setup ## measure quality, memory and serving on this machine
	@$(PYTHON) -m tests.benchmarks

clean: ## remove caches and build products, keep .venv
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find plugin quant_methods tests -name __pycache__ -prune -exec rm -rf {} +
	@echo "clean; .venv is kept (rm -rf .venv removes it)"
