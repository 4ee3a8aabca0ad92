// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// A Capture writes down the packets that pass through a namespace.
type Capture struct {
	file    string
	filter  []string // what was asked for
	process *Process
}

// lastWord is where a capture is told that it has seen all it should: a port
// on the namespace's own loopback, where nobody listens.
const lastWord = "127.0.0.1:9"

// Capture begins to write down the packets of the namespace that match the
// filter (as tcpdump takes it; empty means all), on all interfaces, whole. It
// returns when the first packet would be seen.
func (n *Namespace) Capture(ctx context.Context, filter string) (*Capture, error) {
	file, err := os.CreateTemp(n.world.Dir(), "capture-*.pcap")
	if err != nil {
		return nil, err
	}
	file.Close()
	asked := strings.Fields(filter)
	all := asked
	if len(asked) > 0 {
		all = slices.Concat([]string{"("}, asked, []string{")", "or", "(", "dst", "host", "127.0.0.1", "and", "udp", "dst", "port", "9", ")"})
	}
	args := []string{"-i", "any", "-n", "-U", "-B", "16384", "-s", "0", "-Z", "root", "-w", file.Name()}
	process, err := n.Start(Command{Name: "tcpdump-" + strings.TrimSuffix(file.Name()[strings.LastIndex(file.Name(), "-")+1:], ".pcap"),
		Path: "tcpdump", Args: append(args, all...)})
	if err != nil {
		return nil, err
	}
	c := &Capture{file.Name(), asked, process}
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

// Stop ends the capture when everything seen until now is written: when a
// packet that is sent now has been, which takes up to a second. A capture that
// missed packets is an error.
func (c *Capture) Stop() error {
	word := []byte(fmt.Sprintf("the last word of %s at %d", c.file, time.Now().UnixNano()))
	err := until(context.Background(), 10*time.Second, pollEvery, func() error {
		conn, err := c.process.in.Dial(context.Background(), "udp", lastWord)
		if err != nil {
			return err
		}
		conn.Write(word) // nobody listens, and it may hear so
		conn.Close()
		seen, err := c.Contains(word)
		if err == nil && !seen {
			err = errors.New("the capture lags behind")
		}
		return err
	})
	if err := errors.Join(err, c.process.Stop(5*time.Second)); err != nil {
		return fmt.Errorf("capture in %s: %w", c.process.in.name, err)
	}
	if log := c.process.Log(); !strings.Contains(log, "\n0 packets dropped by kernel") {
		return fmt.Errorf("capture in %s missed packets: %s", c.process.in.name, log)
	}
	return nil
}

// Contains reports whether the bytes occur within one packet of what was
// written down so far. To know of all packets, Stop first.
func (c *Capture) Contains(marker []byte) (bool, error) {
	content, err := os.ReadFile(c.file)
	if err != nil {
		return false, err
	}
	return bytes.Contains(content, marker), nil
}

// Text returns the packets so far as tcpdump prints them, each with what in it is readable.
func (c *Capture) Text(ctx context.Context) (string, error) {
	output, err := c.process.in.Run(ctx, Command{Name: "tcpdump-read", Path: "tcpdump", Args: append([]string{"-nn", "-A", "-r", c.file, "-Z", "root"}, c.filter...)})
	return string(output), err
}
