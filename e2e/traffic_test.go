// SPDX-License-Identifier: Apache-2.0

package e2e

// trafficWords are about who answers, in which protocol.
var trafficWords = map[string]word{}
