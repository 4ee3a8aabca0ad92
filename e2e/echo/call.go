// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/time/rate"
)

// caller calls a URL many times and keeps a report.
type caller struct {
	url         *url.URL
	n           int           // calls; with duration: at most, 0 is any number
	concurrency int           // callers at once
	rate        float64       // calls a second over all; 0 is as fast as it goes
	duration    time.Duration // 0: until n
	timeout     time.Duration // of one call
	hold        time.Duration // one long connection or stream, a message every interval
	every       time.Duration
	host        string
	headers     []string
	halfClose   string // over TCP: end the own half "early", before anything is read, or "late"
	fresh       bool   // a new connection for each HTTP request
	body        string
	json        bool
	changes     bool   // print when somebody else answers, or nobody
	want        string // cluster that must have answered; "" is any
	untilEOF    bool   // stop when standard input ends
}

// dialect makes one call in one protocol.
type dialect interface {
	call(ctx context.Context) (Answer, error)
	io.Closer
}

// holder is a dialect that keeps a connection: say exchanges one message on it.
type holder interface {
	say(ctx context.Context, message string) (Answer, error)
	io.Closer
}

var errWanted = errors.New("an answer came from somewhere else")

func callCommand() *cobra.Command {
	c := &caller{}
	cmd := &cobra.Command{
		Use: "call URL", Short: "call, and tell who answered", Args: cobra.ExactArgs(1),
		Long: `Call, and tell who answered: how many answers by cluster, how many failures, latencies.
The exit code is 1 if a call failed or, with --want, came from another cluster.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := url.Parse(args[0])
			if err != nil {
				return err
			}
			c.url = u
			return c.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.IntVarP(&c.n, "count", "n", 1, "number of calls; 0 with --duration: any number")
	f.IntVarP(&c.concurrency, "concurrency", "c", 1, "callers at once")
	f.Float64Var(&c.rate, "rate", 0, "calls a second over all; 0 means as fast as it goes")
	f.DurationVar(&c.duration, "duration", 0, "stop after this time, or at SIGTERM")
	f.DurationVar(&c.timeout, "timeout", 5*time.Second, "of one call")
	f.DurationVar(&c.hold, "hold", 0, "keep one connection or stream open for this long")
	f.DurationVar(&c.every, "every", 100*time.Millisecond, "time between the messages of --hold")
	f.StringVar(&c.host, "host", "", "Host header")
	f.StringArrayVarP(&c.headers, "header", "H", nil, `header "name: value"`)
	f.BoolVar(&c.fresh, "fresh", false, "a new connection for each request")
	f.StringVar(&c.halfClose, "half-close", "", "tcp: close the own half before the first answer (early) or after it (late); all that was sent must be answered, and its end")
	f.StringVar(&c.body, "body", "hello", "what to send")
	f.BoolVar(&c.json, "json", false, "print every answer")
	f.BoolVar(&c.changes, "changes", false, "print a line, with its time, when another pod answers than before, or none")
	f.BoolVar(&c.untilEOF, "until-eof", false, "stop when standard input ends")
	f.StringVar(&c.want, "want", "", "cluster that must answer")
	return cmd
}

func getCommand() *cobra.Command {
	var method string
	cmd := &cobra.Command{
		Use: "get URL", Short: "one plain request, its body printed", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := http.NewRequestWithContext(cmd.Context(), method, args[0], nil)
			if err != nil {
				return err
			}
			resp, err := (&http.Client{Timeout: 5 * time.Second}).Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
				return err
			}
			if resp.StatusCode >= 400 {
				return errors.New(resp.Status)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&method, "method", "X", http.MethodGet, "method")
	return cmd
}

func (c *caller) run(ctx context.Context, out io.Writer) error {
	if c.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.duration)
		defer cancel()
	}
	if c.untilEOF {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
	}
	r := &report{print: c.json, changes: c.changes, out: out}
	var err error
	if c.hold > 0 {
		err = c.holdOpen(ctx, r)
	} else {
		err = c.repeat(ctx, r)
	}
	r.summarise(out)
	switch {
	case err != nil:
		return err
	case r.failed > 0:
		return fmt.Errorf("%d of %d calls failed", r.failed, r.failed+r.answered)
	case c.want != "" && r.clusters[c.want] != r.answered:
		return fmt.Errorf("%w: want all from %q", errWanted, c.want)
	}
	return nil
}

// repeat makes the calls; one that is under way when ctx ends is finished.
func (c *caller) repeat(ctx context.Context, r *report) error {
	limit := rate.NewLimiter(rate.Inf, 1)
	if c.rate > 0 {
		limit = rate.NewLimiter(rate.Limit(c.rate), max(1, int(c.rate/50)))
	}
	var left sync.Mutex
	taken := 0
	take := func() bool {
		left.Lock()
		defer left.Unlock()
		taken++
		return c.n == 0 || taken <= c.n
	}
	var callers sync.WaitGroup
	errs := make([]error, c.concurrency)
	for i := range c.concurrency {
		callers.Go(func() {
			d, err := c.dialect()
			if err != nil {
				errs[i] = err
				return
			}
			defer d.Close()
			for ctx.Err() == nil && take() {
				if limit.Wait(ctx) != nil {
					return
				}
				one, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.timeout)
				start := time.Now()
				a, err := d.call(one)
				cancel()
				r.add(a, err, start)
			}
		})
	}
	callers.Wait()
	return errors.Join(errs...)
}

// holdOpen keeps one connection and exchanges a message on it from time to time.
func (c *caller) holdOpen(ctx context.Context, r *report) error {
	h, err := c.holder(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	end := time.Now().Add(c.hold)
	tick := time.NewTicker(c.every)
	defer tick.Stop()
	for i := 0; time.Now().Before(end) && ctx.Err() == nil; i++ {
		one, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.timeout)
		start := time.Now()
		message := fmt.Sprintf("%s %d", c.body, i)
		a, err := h.say(one, message)
		cancel()
		if err == nil && a.Body != message {
			err = fmt.Errorf("asked %q, answered %q", message, a.Body)
		}
		r.add(a, err, start)
		if err != nil {
			return fmt.Errorf("cut after %d messages: %w", i, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	return nil
}

func (c *caller) dialect() (dialect, error) {
	switch c.url.Scheme {
	case "http", "https", "h2c":
		return newHTTPDialect(c), nil
	case "grpc":
		return newGRPCDialect(c)
	case "ws":
		return onceEach{c, func(ctx context.Context) (holder, error) { return dialWebSocket(ctx, c) }}, nil
	case "tcp", "first", "tls":
		return onceEach{c, func(ctx context.Context) (holder, error) { return dialLines(ctx, c) }}, nil
	}
	return nil, fmt.Errorf("scheme %q: want http, https, h2c, grpc, ws, tcp, first or tls", c.url.Scheme)
}

func (c *caller) holder(ctx context.Context) (holder, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	switch c.url.Scheme {
	case "ws":
		return dialWebSocket(ctx, c)
	case "grpc":
		return dialStream(c)
	case "tcp", "first", "tls":
		return dialLines(ctx, c)
	}
	return nil, fmt.Errorf("scheme %q cannot be held: want ws, grpc, tcp, first or tls", c.url.Scheme)
}

func (c *caller) header() http.Header {
	h := http.Header{}
	for _, line := range c.headers {
		name, value, _ := strings.Cut(line, ":")
		h.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	return h
}

// onceEach opens a connection for each call.
type onceEach struct {
	c    *caller
	open func(context.Context) (holder, error)
}

func (o onceEach) call(ctx context.Context) (Answer, error) {
	h, err := o.open(ctx)
	if err != nil {
		return Answer{}, err
	}
	defer h.Close()
	if lines, ok := h.(*heldLines); ok && o.c.halfClose != "" {
		return lines.sayAllAndEnd(ctx, o.c.body, o.c.halfClose == "early")
	}
	return h.say(ctx, o.c.body)
}

func (o onceEach) Close() error { return nil }
