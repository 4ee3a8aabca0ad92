// SPDX-License-Identifier: Apache-2.0

package e2e

// outageWords are about parts that are away, replaced or restored.
var outageWords = map[string]word{}
