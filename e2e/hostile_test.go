// SPDX-License-Identifier: Apache-2.0

package e2e

// hostileWords are about what must be refused or survived.
var hostileWords = map[string]word{}
