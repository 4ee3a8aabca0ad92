// SPDX-License-Identifier: Apache-2.0

package envoy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// drain asks Envoy to close its listeners gracefully and waits until its
// connections are gone or the time is up.
func (p *Process) drain(c *child) {
	if p.Drain <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.Drain)
	defer cancel()
	query := "graceful&skip_exit"
	if p.InboundOnly {
		query = "inboundonly&" + query
	}
	if _, err := p.admin(ctx, http.MethodPost, "/drain_listeners?"+query); err != nil {
		p.Log.Warn("envoy was not drained", "error", err)
		return
	}
	began := time.Now()
	open := p.untilIdle(ctx, c, began.Add(p.DrainAtLeast))
	if open == 0 {
		open = p.refuse(c)
	}
	p.Log.Info("envoy drained", "took", time.Since(began).Round(time.Millisecond), "connections_cut", open)
}

// lastMoment is how long those are served who came in the moment in which nobody seemed
// to be there any more.
const lastMoment = time.Second

// refuse closes the listeners for good. Callers who have not learned that we leave, because
// their control service is away, say, are refused from here on and take another pod; a
// connection that was accepted and then cut would be an error to them.
func (p *Process) refuse(c *child) int {
	ctx, cancel := context.WithTimeout(context.Background(), lastMoment)
	defer cancel()
	query := ""
	if p.InboundOnly {
		query = "?inboundonly"
	}
	if _, err := p.admin(ctx, http.MethodPost, "/drain_listeners"+query); err != nil {
		p.Log.Warn("envoy still listens", "error", err)
	}
	return p.untilIdle(ctx, c, time.Time{})
}

// untilIdle returns how many connections were open at the end.
func (p *Process) untilIdle(ctx context.Context, c *child, notBefore time.Time) int {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	open := 0
	for {
		if n, err := p.Connections(ctx); err == nil {
			open = n
			if open == 0 && time.Now().After(notBefore) {
				return 0
			}
		}
		select {
		case <-ctx.Done():
			return open
		case <-c.done:
			return open
		case <-tick.C:
		}
	}
}

// Connections counts the connections open at Envoy's listeners, those for its
// own metrics and administration left out.
func (p *Process) Connections(ctx context.Context) (int, error) {
	body, err := p.admin(ctx, http.MethodGet, `/stats?usedonly&filter=^listener\..*downstream_cx_active$`)
	if err != nil {
		return 0, err
	}
	return countConnections(body)
}

// countConnections adds the listeners' gauges. Envoy also has one a worker,
// which would count everything twice.
func countConnections(stats string) (int, error) {
	total := 0
	lines := bufio.NewScanner(strings.NewReader(stats))
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), ": ")
		if !ok || strings.Contains(name, ".worker_") || strings.HasPrefix(name, "listener.admin.") || strings.Contains(name, "_15090.") {
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil {
			return 0, fmt.Errorf("envoy statistic %s: %w", name, err)
		}
		total += n
	}
	return total, lines.Err()
}

// Ready asks Envoy whether it has initialised. A nil error means yes.
func (p *Process) Ready(ctx context.Context) error {
	_, err := p.admin(ctx, http.MethodGet, "/ready")
	return err
}

func (p *Process) admin(ctx context.Context, method, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, "http://"+p.Admin+path, nil)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", fmt.Errorf("envoy admin: %w", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 8<<20))
	if err != nil {
		return "", fmt.Errorf("envoy admin %s: %w", path, err)
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("envoy admin %s: %s: %s", path, response.Status, strings.TrimSpace(string(body)))
	}
	return string(body), nil
}
