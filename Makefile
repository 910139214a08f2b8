# The only list of commands. `make` alone builds; `make test` is what the continuous integration runs (.ci/run).
SHELL := /bin/bash
CARGO ?= cargo
# The directory cargo writes to, wherever the environment or a configuration file puts it.
TARGET = $(shell $(CARGO) metadata --format-version 1 --no-deps --offline | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')

.PHONY: build debug run test packages unit tidy e2e e2e-reference demo bench lab lint fmt doc ci clean-lab

build:                  ## the daemon and the command line, optimised, in target/release
	$(CARGO) build --release -p kilnd -p kiln

debug:                  ## the same for development, in target/debug
	$(CARGO) build -p kilnd -p kiln

run: build              ## a daemon in the foreground on ./kiln.sock with its state in ./.cache/kiln
	mkdir -p .cache/kiln
	$(TARGET)/release/kilnd --root .cache/kiln --addr unix://$(CURDIR)/kiln.sock $(ARGS)

test: tidy unit e2e     ## everything; KILN_E2E=0 leaves the end-to-end level out
	@if [ "$(KILN_E2E)" = 0 ]; then echo "make test: passed WITHOUT the end-to-end tests (KILN_E2E=0)"; \
	else echo "make test: all tests passed"; fi

tidy:                   ## rules of the source tree
	$(CARGO) test -p kiln-e2e --lib --test tidy

packages:               ## Debian packages that tests need; a second the next time
	tests/lab/install

unit: packages          ## unit and crate tests
	$(CARGO) test --workspace --exclude kiln-e2e

lab:                    ## packages, two versions of docker-buildx, base images; seconds when they are there
	tests/lab/install
	tests/lab/images

e2e:                    ## end to end: the real docker buildx against kilnd; FILTER=name picks tests
	@if [ "$(KILN_E2E)" = 0 ]; then echo "end-to-end tests left out: KILN_E2E=0"; \
	else set -e; $(MAKE) --no-print-directory lab debug; $(CARGO) test -p kiln-e2e --test e2e -- $(FILTER); fi

e2e-reference:          ## the same expectations tried on another daemon: PEER=/path/to/buildkitd
	@test -x "$(PEER)" || { echo "name the daemon: make e2e-reference PEER=/path/to/buildkitd"; exit 2; }
	$(MAKE) --no-print-directory lab
	KILN_E2E_DAEMON=$(PEER) $(CARGO) test -p kiln-e2e --test e2e -- $(FILTER)

demo: build             ## real multi-stage builds through docker buildx, start to end, in one go
	tests/lab/install
	tests/lab/images busybox alpine golang node nginx distroless
	$(CARGO) run -q --release -p kiln-e2e --bin kiln-demo

bench: build            ## times through docker buildx; PEER=/path/to/buildkitd adds the other daemon and ratios; LINES=name picks
	tests/lab/install
	tests/lab/images busybox alpine debian
	PEER=$(PEER) $(CARGO) run -q --release -p kiln-e2e --bin kiln-bench -- $(LINES)

lint:                   ## formatting and clippy, warnings are errors
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

fmt:                    ## formats the sources
	$(CARGO) fmt --all

doc:                    ## the documentation of the crates
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items

ci:                     ## what .ci/run does
	.ci/run

clean-lab:              ## removes images and downloads of the lab
	. tests/lab/where && rm -rf "$$LAB_CACHE"
