// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"fmt"
	"time"
)

// pollEvery is how often the bed looks whether something has come up.
const pollEvery = 20 * time.Millisecond

// until asks again at the interval until condition is met, and fails with its last
// answer at the deadline.
func until(ctx context.Context, deadline, interval time.Duration, condition func() error) error {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		err := condition()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w after %s: %w", context.Cause(ctx), deadline, err)
		case <-ticker.C:
		}
	}
}
