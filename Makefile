# Everything a developer runs. `make` alone lists the targets. Needed: make and python3 >= 3.11.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
ENGINE ?= docker
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' rdev/__init__.py)
REVISION ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

UV_COMPILE := $(BIN)/uv pip compile pyproject.toml --universal --generate-hashes --quiet \
	--no-emit-index-url --no-header --python-version 3.11 $(if $(UPGRADE),--upgrade)
# flake8-async takes files. 114, 124 and 128 misfire on functions that pass `task_status` on; 109 is off
# for ruff too; 91x would have every short path make a checkpoint; 119 and 900 are against async
# generators, which Quart takes as bodies and closes itself.
FLAKE8_ASYNC := $(BIN)/flake8-async \
	--disable=ASYNC109,ASYNC114,ASYNC119,ASYNC124,ASYNC128,ASYNC900,ASYNC91

.DEFAULT_GOAL := help
.PHONY: help setup demo serve check test test-browser test-compose test-contract test-faults test-kubernetes test-observability test-simulation coverage bench binary image sbom lock hooks docs-states docs-limits rules dashboards clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-16s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make the virtual environment with its rdev, once

$(STAMP): requirements/dev.txt pyproject.toml
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh requirements/setup.sh
	@touch $@

demo: setup ## start rdev on its own PostgreSQL and show a command live
	$(BIN)/rdev demo

serve: setup ## start rdev
	$(BIN)/rdev serve

check: setup ## format, lint, trio rules, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	find rdev -name '*.py' -print0 | xargs -0 $(FLAKE8_ASYNC)
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup ## all tests but the minutes-long suites
	$(BIN)/python -m pytest -q -n 3 --dist loadfile -m 'not full' $(ARGS)

test-browser: setup ## streams through a real nginx and in a real Chromium (see CONTRIBUTING: what it needs)
	$(BIN)/python -m pytest -q -s tests/browser $(ARGS)

test-compose: setup ## the image and compose.yaml on a Docker engine, brought up where none answers (tests/e2e)
	PYTHON=$(BIN)/python timeout 1800 tests/e2e/run.sh $(BIN)/python -m pytest -q tests/e2e $(ARGS)

test-faults: setup ## crashes, cuts and kills at the worst moment: twenty minutes, with a ledger
	$(BIN)/python -m pytest -q tests/faults $(ARGS)

test-contract: setup ## 100,000 requests invented from the OpenAPI document (MINUTES=60 at most)
	$(BIN)/python -m tests.contract --minutes $(or $(MINUTES),60)

test-kubernetes: setup ## what runs in pods: on a fake API server and on a real cluster, with a ledger (tests/cluster)
	tests/cluster/run.sh $(BIN)/python -m pytest -q tests/adapters/kubernetes tests/adapters/execution \
		tests/app/test_kubernetes.py tests/app/test_pod_projects.py tests/faults/test_attach.py tests/cluster $(ARGS)

test-observability: setup ## a real Prometheus and Alertmanager: every query, every alert (apt-get install prometheus prometheus-alertmanager)
	$(BIN)/python -m pytest -q -s tests/deploy/test_monitoring.py tests/observability $(ARGS)

test-simulation: setup ## seeded runs of two servers under faults (SEEDS=10000); SEED=n replays one
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),10000))

coverage: setup ## tests with branch coverage and a floor for each room
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m 'not full' $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage json --quiet -o .coverage.json
	$(BIN)/python tests/coverage_floors.py .coverage.json

bench: setup ## measure; SCENARIO='name name' picks some
	$(BIN)/python -m bench $(SCENARIO)

binary: setup ## dist/rdev, one file with all of it (see docs/operations/deployment.md)
	@$(BIN)/python -c 'import PyInstaller' 2>/dev/null || \
		{ echo "make binary: run $(BIN)/pip install -e '.[binary]'" >&2; exit 1; }
	$(BIN)/pyinstaller --noconfirm --clean --log-level WARN --distpath dist --workpath build/binary \
		deploy/binary/rdev.spec
	RDEV_TEST_BINARY=$(CURDIR)/dist/rdev $(BIN)/python -m pytest -q tests/deploy/test_binary.py

image: ## the container image; ENGINE=podman, BASE=… for another base
	$(ENGINE) build $(if $(BASE),--build-arg BASE=$(BASE)) --build-arg REVISION=$(REVISION) \
		--build-arg VERSION=$(VERSION) --tag rdev:$(VERSION) --file deploy/Containerfile .

sbom: setup ## dist/rdev.cdx.json: what is in the image, of its lock
	@$(BIN)/python -c 'import cyclonedx_py' 2>/dev/null || \
		{ echo "make sbom: run $(BIN)/pip install -e '.[sbom]'" >&2; exit 1; }
	@mkdir -p dist
	$(BIN)/cyclonedx-py requirements requirements/image.txt --pyproject pyproject.toml \
		--mc-type application --output-reproducible --of JSON --output-file dist/rdev.cdx.json

lock: setup ## pin the dependencies anew (UPGRADE=1 takes the newest)
	$(UV_COMPILE) -o requirements/image.txt
	$(UV_COMPILE) --extra embedded -o requirements/runtime.txt
	$(UV_COMPILE) --extra embedded --extra dev -o requirements/dev.txt

hooks: setup ## run the checks before every commit
	$(BIN)/prek install

docs-states: setup ## write docs/states.md from the transition table
	$(BIN)/python docs/generate_states.py

docs-limits: setup ## write docs/api/limits.md from the code
	PYTHONPATH=. $(BIN)/python docs/generate_limits.py

rules: setup ## write the PrometheusRule of deploy/k8s from deploy/prometheus/rules.yaml
	$(BIN)/python deploy/prometheus/generate.py

dashboards: setup ## write deploy/grafana/dashboards
	$(BIN)/python deploy/grafana/generate.py

clean: ## remove what was built; the state folder .rdev stays
	rm -rf $(VENV) .venv-* build dist htmlcov coverage.xml .coverage* bench/results
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	find rdev tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +
