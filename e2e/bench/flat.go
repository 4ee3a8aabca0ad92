// SPDX-License-Identifier: Apache-2.0

package main

import "context"

func playFlat(ctx context.Context, b *bench) error    { return nil }
func playGateway(ctx context.Context, b *bench) error { return nil }
