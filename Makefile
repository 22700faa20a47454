# `make help` lists the targets. `make demo` and `make test` need nothing but cargo and a C
# compiler: they find or install the rest and say so.
.DEFAULT_GOAL := help
.PHONY: help demo test lint build bench bench-blame dev-d down logs-worker shell-worker shell-backend migrate audit sbom clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo:  ## analyse a real repository: Python enqueues, celeriac works, the table and the rows appear (DEMO_REPO=url)
	@scripts/demo

test:  ## run all tests against real servers and the real Python client
	@scripts/test

lint:  ## format, clippy with warnings as errors, shell scripts, house rules
	@scripts/lint

build:  ## the release binary: target/release/celeriac
	cargo build --release --locked

bench:  ## throughput, latency, memory and start beside a Python Celery worker
	@scripts/bench

bench-blame:  ## celeriac analyze beside git blame per file (REPO=path [SAMPLE=files])
	@scripts/bench-blame "$(REPO)" $(SAMPLE)

dev-d:  ## start redis, database, worker, Flower and the example backend in containers
	docker compose up --build --detach --wait

down:  ## stop the containers of dev-d and keep their data
	docker compose down

logs-worker:  ## follow the worker's log
	docker compose logs --follow worker

shell-worker:  ## a shell in the worker's container
	docker compose exec worker sh

shell-backend:  ## a shell in the example backend's container
	docker compose exec backend bash

migrate:  ## bring the database of DATABASE_URL up to date (the worker does it at start, too)
	cargo run --release --locked -- migrate

audit:  ## advisories, licences and sources of all dependencies (cargo-deny)
	@scripts/audit

sbom:  ## the bill of materials of the binary: target/celeriac.cdx.json
	@mkdir -p target && scripts/sbom > target/celeriac.cdx.json && echo target/celeriac.cdx.json

clean:  ## stop private servers; remove build products, .venv and .services
	scripts/services down
	cargo clean
	rm -rf .venv .services
