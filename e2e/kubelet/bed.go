// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// InBed attaches pods to a network of the test bed.
func InBed(network *bed.Network) Network { return bedNetwork{network} }

type bedNetwork struct{ network *bed.Network }

// Attach implements Network.
func (b bedNetwork) Attach(_ context.Context, name string, addrs []netip.Addr) (Namespace, error) {
	ns, err := b.network.Router().World().Namespace(name)
	if err != nil {
		return nil, err
	}
	for _, addr := range addrs {
		if err := b.network.Attach(ns, addr); err != nil {
			return nil, errors.Join(fmt.Errorf("pod %s: %w", name, err), ns.Close())
		}
	}
	return ns, nil
}
