// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
)

// child is this program in a process of its own, playing what is measured: orders go in as
// lines, answers come out as JSON.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// newChild starts one; a variable of its environment says what it is to play.
func newChild(ctx context.Context, name, value string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &child{cmd: exec.CommandContext(ctx, self)}
	c.cmd.Env = append(os.Environ(), name+"="+value)
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.out = json.NewDecoder(bufio.NewReader(out))
	return c, c.cmd.Start()
}

// ask gives an order, and takes the answer.
func (c *child) ask(order string, answer any) error {
	if _, err := io.WriteString(c.in, order+"\n"); err != nil {
		return err
	}
	return c.out.Decode(answer)
}

// stop ends it by the end of its orders.
func (c *child) stop() error { return errors.Join(c.in.Close(), c.cmd.Wait()) }
