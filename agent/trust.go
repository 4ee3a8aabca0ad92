// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/hex"

	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/agent/report"
)

// keepTrust keeps the roots current over a connection to meshd, and tells it once
// Envoy verifies peers with them.
func (a *Agent) keepTrust(ctx context.Context, conn grpc.ClientConnInterface) {
	trust := &report.Trust{Take: a.keeper.Trust, Acknowledged: a.secrets.Acknowledged, Authority: a.authority, Log: a.log}
	trust.Talk(ctx, conn)
}

// authority is the ID of what signed the present certificate, empty without one, and a
// channel that is closed at the next one.
func (a *Agent) authority() (string, <-chan struct{}) {
	changed := a.keeper.Changed()
	cert, err := a.keeper.Current()
	if err != nil {
		return "", changed
	}
	return hex.EncodeToString(cert.Leaf.AuthorityKeyId), changed
}
