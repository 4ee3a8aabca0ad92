// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"github.com/isthmus-mesh/isthmus/ca"
)

// wireRotation takes the automatic steps of rotations, by what the workloads' agents say at
// all replicas.
func (d *daemon) wireRotation() {
	rotator := &ca.Rotator{Authority: d.authority, Standing: d.admin.Standing, Replica: d.replica, Log: d.log.With("component", "ca")}
	d.run("rotation", rotator.Run)
}

// adminRetry is the pause after admin.conf could not be written.
const adminRetry = 15 * time.Second

// keepAdmin writes the administrator's access anew when an authority was replaced that it
// needs. Copies that were taken of it are not.
func (d *daemon) keepAdmin(ctx context.Context) error {
	for {
		changed := d.authority.Changed()
		var again <-chan time.Time
		if err := d.writeAdmin(ctx); err != nil && ctx.Err() == nil {
			d.log.Error("the administrator's access is not kept current", "error", err)
			again = time.After(adminRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}
