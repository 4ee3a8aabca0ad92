#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Generates the Go code of every .proto file in this folder, with protoc from
# the PATH (Debian: protobuf-compiler) and the plugins pinned in go.mod.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -o "$bin" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
PATH=$bin:$PATH protoc -I. \
  --go_out=. --go_opt=paths=source_relative \
  --go-grpc_out=. --go-grpc_opt=paths=source_relative \
  ./*.proto
