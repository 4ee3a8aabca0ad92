// SPDX-License-Identifier: Apache-2.0

// Package deploy holds what is installed on machines that are not ours to
// build: the onboarding script of virtual machines and the agent's unit.
package deploy

import _ "embed"

// OnboardScript is deploy/vm/onboard.sh, the same bytes for every machine, so
// that its checksum can be compared with that of a release.
//
//go:embed vm/onboard.sh
var OnboardScript []byte

// AgentUnit is the systemd unit of the agent on a virtual machine.
//
//go:embed vm/mesh-agent.service
var AgentUnit []byte
