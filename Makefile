GO      ?= go
BIN     := bin
PLUGINS := counter kv shop
LDFLAGS := -s -w
export CGO_ENABLED ?= 0
PROTOS  := $(shell find plugins components dht node -name '*.proto' 2>/dev/null)

.PHONY: build demo test test-long race lint bench gen clean tools help

build: ## the binary and the shipped components, into bin/
	@[ -d "$$($(GO) env GOCACHE)/00" ] && [ -x $(BIN)/coppice ] || echo "building coppice: a first build takes some minutes"
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/coppice ./cmd/coppice
	@for p in $(PLUGINS); do $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/components/$$p ./plugins/$$p || exit 1; done
