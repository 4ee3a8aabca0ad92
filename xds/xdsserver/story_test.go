// SPDX-License-Identifier: Apache-2.0

package xdsserver_test

import (
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

func generators() map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator {
	sidecar := func(r xdsserver.Restraint) xdsserver.Generator { return &xds.Builder{Weigh: r.Weigh, Closed: r.Closed} }
	return map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator{
		federation.Sidecar: sidecar, federation.VMRole: sidecar,
	}
}
