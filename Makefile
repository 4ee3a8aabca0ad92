# SPDX-License-Identifier: Apache-2.0
.POSIX:
.DELETE_ON_ERROR:

GO ?= go
BENCH ?=
ONCE ?=

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

prepare: ## fetch and build what tests and demo need, into a cache of its own (a second time: nothing)
	@$(GO) run ./e2e/prepare

demo: prepare build ## two clusters, a VM, the control service, a shop; Ctrl-C removes it all (ONCE=1: exit after the last step)
	@ONCE=$(ONCE) bin/demo

test: prepare ## everything that must be green: format, vet, staticcheck, house rules, unit with -race, end to end
	@$(GO) run ./e2e/suite

check: test ## the same as test

bench: prepare ## figures, one line of JSON each (BENCH=name runs one)
	@$(GO) run ./e2e/bench $(BENCH)

build: ## the programs, into bin/
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/... ./e2e/demo ./e2e/echo

fmt: ## format all Go files
	@gofmt -w $$($(GO) list -f '{{.Dir}}' ./...)

clean: ## remove bin/ (the cache stays: see "go run ./e2e/prepare -h")
	rm -rf bin

.PHONY: help prepare demo test check bench build fmt clean
