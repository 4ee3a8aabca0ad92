// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// A Capture writes down the packets that pass through a namespace.
type Capture struct {
	file    string
	process *Process
}

// Capture begins to write down the packets of the namespace that match the
// filter (as tcpdump takes it; empty means all), on all interfaces, whole. It
// returns when the first packet would be seen.
func (n *Namespace) Capture(ctx context.Context, filter string) (*Capture, error) {
	file, err := os.CreateTemp(n.world.Dir(), "capture-*.pcap")
	if err != nil {
		return nil, err
	}
	file.Close()
	args := []string{"-i", "any", "-n", "-U", "--immediate-mode", "-s", "0", "-Z", "root", "-w", file.Name()}
	process, err := n.Start(Command{Name: "tcpdump-" + strings.TrimSuffix(file.Name()[strings.LastIndex(file.Name(), "-")+1:], ".pcap"),
		Path: "tcpdump", Args: append(args, strings.Fields(filter)...)})
	if err != nil {
		return nil, err
	}
	c := &Capture{file.Name(), process}
	if err := until(ctx, 10*time.Second, pollEvery, func() error {
		if !strings.Contains(process.Log(), "listening on") {
			return fmt.Errorf("tcpdump is not listening yet: %s", process.Log())
		}
		return nil
	}); err != nil {
		return nil, errors.Join(err, process.Kill())
	}
	return c, nil
}

// CaptureTransit begins to write down what passes between all networks.
func (w *World) CaptureTransit(ctx context.Context, filter string) (*Capture, error) {
	return w.transit.Capture(ctx, filter)
}

// File returns the path of the file, in pcap format. It goes with the world.
func (c *Capture) File() string { return c.file }

// Stop ends the capture when everything seen until now is written: when
// nothing has been added for a tenth of a second.
func (c *Capture) Stop() error {
	var size int64 = -1
	err := until(context.Background(), 5*time.Second, 100*time.Millisecond, func() error {
		info, err := os.Stat(c.file)
		if err != nil {
			return err
		}
		if info.Size() != size {
			size = info.Size()
			return errors.New("packets still arrive")
		}
		return nil
	})
	return errors.Join(err, c.process.Stop(5*time.Second))
}

// Contains reports whether the bytes occur in what was captured so far, within
// one packet.
func (c *Capture) Contains(marker []byte) (bool, error) {
	content, err := os.ReadFile(c.file)
	if err != nil {
		return false, err
	}
	return bytes.Contains(content, marker), nil
}

// Text returns the packets so far as tcpdump prints them, one line each.
func (c *Capture) Text(ctx context.Context) (string, error) {
	output, err := c.process.in.Run(ctx, Command{Name: "tcpdump-read", Path: "tcpdump", Args: []string{"-nn", "-r", c.file, "-Z", "root"}})
	return string(output), err
}
