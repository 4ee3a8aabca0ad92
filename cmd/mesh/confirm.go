// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"strings"
)

// confirm asks for a name to be typed before something is destroyed. Without a
// terminal it asks nothing and wants --yes.
func (s *session) confirm(yes bool, question, name string) error {
	if yes {
		return nil
	}
	if !s.inTerminal || !s.errTerminal {
		return usagef("this needs a confirmation, and there is no terminal to ask on: add --yes")
	}
	fmt.Fprintf(s.stderr, "%s [type %s to continue] ", question, name)
	line, err := bufio.NewReader(s.stdin).ReadString('\n')
	if strings.TrimSpace(line) != name {
		return &failure{exit: exitFailed, what: "nothing was done", why: "the name was not typed", err: err}
	}
	return nil
}
