# One page: what a newcomer needs (build, demo, test) and what a maintainer needs besides.
GO      ?= go
BIN     := bin
LDFLAGS := -s -w
MODULE  := github.com/coppice-project/coppice
# The shipped components.
PLUGINS := counter kv shop shopweb bank
# Packages of this module, without generated code, for the linters.
GOFILES  = $(shell git ls-files '*.go' | grep -v -E '\.pb\.go$$|\.connect\.go$$')
PROTOS   = $(shell git ls-files '*.proto')
export CGO_ENABLED ?= 0

.PHONY: build demo test test-long race sim planted lint bench gen gen-python clean help

build: ## build bin/coppice and the shipped components (the default)
	@[ -x $(BIN)/coppice ] || echo "building coppice; the first build of its libraries takes some minutes"
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/coppice ./cmd/coppice
	@for p in $(PLUGINS); do $(GO) build -trimpath -ldflags '$(LDFLAGS) -X main.version=1.0.0' -o $(BIN)/components/$$p ./plugins/$$p || exit 1; done
	@# what the demo and the benchmarks swap to: newer versions, and one that never becomes healthy
	@$(GO) build -trimpath -ldflags '$(LDFLAGS) -X main.version=1.1.0' -o $(BIN)/demo/kv-1.1.0 ./plugins/kv
	@$(GO) build -trimpath -ldflags '$(LDFLAGS) -X main.version=1.1.0' -o $(BIN)/demo/shop-1.1.0 ./plugins/shop
	@$(GO) build -trimpath -ldflags '$(LDFLAGS) -X main.version=1.2.0 -X main.broken=never-ready' -o $(BIN)/demo/shop-1.2.0 ./plugins/shop

demo: build ## run a five-node cluster with two applications, kill nodes, swap versions; every figure measured
	$(BIN)/coppice demo

test: build ## every test that ends within minutes (TESTFLAGS=-race: with the race detector, as CI does)
	$(GO) vet ./...
	$(if $(findstring -race,$(TESTFLAGS)),CGO_ENABLED=1) $(GO) test -timeout 20m $(TESTFLAGS) $$($(GO) list ./... | grep -v '/internal/sim$$')
	@# the simulation alone, for it takes every processor for minutes and others measure
	$(if $(findstring -race,$(TESTFLAGS)),CGO_ENABLED=1) $(GO) test -timeout 20m $(TESTFLAGS) ./internal/sim
	$(if $(findstring -race,$(TESTFLAGS)),@true,$(PLANTED) ./internal/sim)
	@# by unit tests, within seconds
	$(PLANTED) $(UNITS)
	$(GO) test -tags harm ./internal/harm

PLANTED = $(GO) test -tags planted -count=1 -timeout 15m -run Planted
# The packages whose unit tests show rules that the simulation does not.
UNITS = ./membrane ./components/supervisor ./dht/arbiter

planted: ## show that each safety rule broken on purpose is found, by the simulation or a unit test (make test does so too), and one of them by real processes
	$(PLANTED) ./internal/sim
	$(PLANTED) $(UNITS)
	$(PLANTED) ./internal/nemesis

race: ## the same with the race detector (needs a C compiler); what CI runs
	$(MAKE) test TESTFLAGS=-race

LONG = COPPICE_LONG=1 $(GO) test -count=1 -run Long -v -p 1

test-long: build ## the long runs, one after the other: simulation schedules, the nemesis, 1,000 kill -9 cycles (COPPICE_CYCLES), 100 of a demo's, and the rest
	@# 50,000 schedules are 1.8 hours of one core; the nemesis takes an hour of its own, 1,000 cycles some hours; the rest takes minutes each
	$(LONG) -timeout 8h ./internal/sim
	$(LONG) -timeout 12h ./internal/nemesis
	$(LONG) -timeout 2h ./internal/e2e ./internal/demo
	$(LONG) -timeout 2h $$($(GO) list ./... | grep -v -E '/internal/(sim|nemesis|e2e|demo)$$')
	$(PLANTED) ./internal/nemesis

sim: ## replay one simulation schedule with its events: make sim SEED=registers/17 (TIMES=10: again and again)
	COPPICE_SIM_SEED=$(SEED) COPPICE_SIM_TIMES=$(TIMES) $(GO) test -count=1 -run TestReplay -v ./internal/sim

bench: build ## every benchmark, one JSON document each
	$(BIN)/coppice bench all

lint: ## gofumpt, vet, staticcheck
	@out=$$($(GO) tool -modfile=internal/tools/go.mod gofumpt -l $(GOFILES)); [ -z "$$out" ] || { echo "gofumpt: $$out"; exit 1; }
	$(GO) vet ./...
	$(GO) tool -modfile=internal/tools/go.mod staticcheck ./...

gen: ## generate code from the .proto files (needs protoc)
	@command -v protoc >/dev/null || { echo "protoc is missing: apt-get install protobuf-compiler"; exit 1; }
	@mkdir -p $(BIN)/tools && for t in google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc connectrpc.com/connect/cmd/protoc-gen-connect-go; do \
		$(GO) build -modfile=internal/tools/go.mod -o $(BIN)/tools/ $$t || exit 1; done
	PATH=$(CURDIR)/$(BIN)/tools:$$PATH protoc -I . --go_out=. --go_opt=module=$(MODULE) \
		--go-grpc_out=. --go-grpc_opt=module=$(MODULE) $(filter-out node/api/%,$(PROTOS))
	PATH=$(CURDIR)/$(BIN)/tools:$$PATH protoc -I . --go_out=. --go_opt=module=$(MODULE) \
		--connect-go_out=. --connect-go_opt=module=$(MODULE),simple=true $(filter node/api/%,$(PROTOS))

PYTHON_KV = plugins/kv/python
gen-python: ## generate the Python stubs of plugins/kv/python (needs protoc and gRPC's plugin for Python)
	@command -v grpc_python_plugin >/dev/null || { echo "gRPC's plugin for Python is missing: apt-get install protobuf-compiler protobuf-compiler-grpc"; exit 1; }
	protoc -I plugins/kv -I plugins/contract/component/v1 -I plugins/sdk/statev1 --python_out=$(PYTHON_KV) kv.proto component.proto state.proto
	protoc -I plugins/kv -I plugins/contract/component/v1 --plugin=protoc-gen-grpc_python="$$(command -v grpc_python_plugin)" \
		--grpc_python_out=$(PYTHON_KV) kv.proto component.proto

clean: ## remove what build made
	rm -rf $(BIN)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
