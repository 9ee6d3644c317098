# Every target sets up what it needs. `make help` lists them.
SHELL := /bin/bash
PY := .venv/bin/python
ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=MESH_REQUIRE_KERNEL,KEEP)
PROTOS := $(wildcard meshapi/*.proto)
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo package test test-package test-unit test-kernel test-kernels test-kubernetes images check generate pictures lock bench bench-l4 bench-l7 bench-fairness bench-mtls bench-identity bench-agent bench-hooks bench-maps bench-observe bench-scale bench-kubernetes clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what `make demo` needs (Debian packages, .venv, pinned dependencies)
	@scripts/setup run

setup-dev: ## the same, and what tests, checks and benchmarks need
	@scripts/setup dev

demo: setup ## the main job: two nodes, a small shop, every promise checked (KEEP=1 leaves the lab up)
	@$(ROOT) $(PY) -m lab.demo

test: setup-dev ## unit tests, then kernel tests
	$(ROOT) $(PY) -m pytest tests

test-unit: setup-dev ## unit tests only: no root, no eBPF
	$(PY) -m pytest tests/unit

test-kernel: setup-dev ## kernel tests only: root, real eBPF
	$(ROOT) $(PY) -m pytest tests/kernel

test-kernels: ## kernel tests on Debian's stock kernels, emulated: about half an hour (KERNELS="6.1 6.12 newest 5.10", ARGS=--help)
	@scripts/setup kernels
	$(ROOT) $(PY) -m tests.kernel.kernels $(KERNELS) $(ARGS)

images: ## the images of agent and controller, in build/images, with their bills of materials (BASE=IMAGE, TAG=TAG)
	@scripts/setup kubernetes
	@$(ROOT) env $(if $(BASE),BASE=$(BASE)) $(if $(TAG),TAG=$(TAG)) scripts/images

test-kubernetes: images ## a real API server, and a node with the mesh on it: etcd and kube-apiserver from KUBEBUILDER_ASSETS, or built once by Go
	assets=$$(scripts/kubernetes) && { helm=$$(scripts/render --helm) || true; } && $(ROOT) env MESH_KUBERNETES_ASSETS=$$assets HELM=$$helm $(PY) -m pytest tests/kubernetes

package: setup ## Debian packages of agent and controller, into build/package
	@scripts/package

test-package: ## the packages on a Debian 12 with systemd: installed, restarted, upgraded, removed; some six minutes
	@scripts/setup package
	$(ROOT) env MESH_PACKAGES=build/package $(PY) -m pytest tests/package

check: setup-dev ## ruff, strict mypy, import contracts, generated code up to date
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	scripts/generate --check
	$(PY) -m deploy.grafana.build --check
	$(PY) -m deploy.definitions --check
	scripts/render --check
	promtool check rules deploy/prometheus/rules.yaml

generate: setup-dev ## regenerate meshapi/*_pb2* from the .proto files, what is known of the CRDs, Grafana's dashboards, and the manifests of the Helm chart
	scripts/generate
	$(PY) -m deploy.definitions
	$(PY) -m deploy.grafana.build
	scripts/render

pictures: setup-dev ## pictures of the docs, from real runs of the lab
	$(ROOT) $(PY) -m tests.pictures
	@mkdir -p docs/dashboards
	$(ROOT) env MESH_PICTURES=docs/dashboards MESH_PICTURES_S=90 $(PY) -m pytest -q tests/kernel/test_mesh_dashboards.py -k drawn

lock: setup-dev ## pin the newest releases that requirements*.in allow
	for f in requirements requirements-dev; do .venv/bin/uv pip compile --quiet --upgrade --python /usr/bin/python3 --generate-hashes \
	  --no-emit-index-url --custom-compile-command "make lock" $$f.in -o $$f.lock; done

bench: bench-l4 bench-l7 bench-fairness bench-mtls bench-identity bench-agent bench-hooks bench-maps bench-observe bench-scale ## all benchmarks

bench-l4: setup-dev ## same-node L4 against no mesh at all (one JSON object a result)
	@$(ROOT) $(PY) -m bench.l4

bench-l7: setup-dev ## one waypoint hop against a bare Envoy hop and against two sidecars with mTLS
	@$(ROOT) $(PY) -m bench.l7

bench-fairness: setup-dev ## how long a quiet workload waits at the waypoint beside one that floods it
	@$(ROOT) $(PY) -m bench.fairness

bench-mtls: setup-dev ## TCP between two nodes, encrypted, against no mesh and against two sidecars with mTLS
	@$(ROOT) $(PY) -m bench.mtls

bench-identity: setup-dev ## how long certificates of new workloads take, and 250 workloads at once
	@$(ROOT) $(PY) -m bench.identity

bench-agent: setup-dev ## agent start to ready, and its memory; with 100,000 endpoints: memory, idle CPU, changes, scrapes
	@$(ROOT) $(PY) -m bench.agent

bench-hooks: setup-dev ## nanoseconds that one run of each kernel program takes
	@$(ROOT) $(PY) -m bench.hooks

bench-maps: setup-dev ## 100,000 endpoints from their bytes into the kernel, and one change of them
	@$(ROOT) $(PY) -m bench.maps

bench-observe: setup-dev ## what metrics, traces, logs and the record of calls cost, and a scrape with 10,000 series of requests
	@$(ROOT) $(PY) -m bench.observe

bench-kubernetes: setup-dev ## 50,000 pods listed and watched by the controller (ARGS=--help)
	@assets=$$(scripts/kubernetes) && $(PY) -m tests.kubernetes.scale --assets $$assets $(ARGS)

bench-scale: setup-dev ## 250 workloads, 2,000 L7 services and 500 routes on one node: Envoy's configuration, its changes, memory
	@$(ROOT) $(PY) -m bench.scale

clean: ## remove .venv, caches and build/
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
