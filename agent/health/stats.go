// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
)

// scrapeTimeout bounds each of the scrapes behind one answer.
const scrapeTimeout = 5 * time.Second

// scrapeLimit bounds what one of them may return, in bytes.
const scrapeLimit = 64 << 20

// Stats answers with the metrics of Envoy, of the agent, and of the workload
// if it has any, in Prometheus' text format. A part that cannot be had is left
// out and counted, so that a broken workload does not hide its proxy.
type Stats struct {
	// Envoy is the URL of Envoy's metrics; empty leaves them out.
	Envoy string
	// Workload is the URL of the workload's own; empty leaves them out.
	Workload string
	// Client reaches both; nil means http.DefaultClient.
	Client *http.Client
	// Agent are the agent's own.
	Agent prometheus.Gatherer
	// Failures counts scrapes that failed, by part; may be nil.
	Failures *prometheus.CounterVec
	// Log gets why; nil discards.
	Log *slog.Logger
}

// ServeHTTP implements http.Handler.
func (s *Stats) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var out bytes.Buffer
	s.part(&out, "envoy", func(to io.Writer) error { return s.scrape(r.Context(), to, s.Envoy) })
	s.part(&out, "workload", func(to io.Writer) error { return s.scrape(r.Context(), to, s.Workload) })
	s.part(&out, "agent", s.own)
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	_, _ = w.Write(out.Bytes()) // a scraper that went away is not our failure
}

// part appends a whole part or nothing, and ends it with a line break.
func (s *Stats) part(out *bytes.Buffer, name string, write func(io.Writer) error) {
	var one bytes.Buffer
	if err := write(&one); err != nil {
		if s.Failures != nil {
			s.Failures.WithLabelValues(name).Inc()
		}
		if s.Log != nil {
			s.Log.Warn("metrics not scraped", "of", name, "error", err)
		}
		return
	}
	text := bytes.TrimSuffix(bytes.TrimRight(one.Bytes(), "\n"), []byte("# EOF"))
	if len(text) == 0 {
		return
	}
	out.Write(text)
	if text[len(text)-1] != '\n' {
		out.WriteByte('\n')
	}
}

func (s *Stats) scrape(ctx context.Context, to io.Writer, url string) error {
	if url == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, scrapeTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	// One format for all parts, else they could not be put one after another.
	request.Header.Set("Accept", "text/plain;version=0.0.4;q=1,*/*;q=0.1")
	client := s.Client
	if client == nil {
		client = http.DefaultClient
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, response.Status)
	}
	_, err = io.Copy(to, io.LimitReader(response.Body, scrapeLimit))
	return err
}

func (s *Stats) own(to io.Writer) error {
	if s.Agent == nil {
		return nil
	}
	families, err := s.Agent.Gather()
	if err != nil {
		return err
	}
	encoder := expfmt.NewEncoder(to, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, family := range families {
		if err := encoder.Encode(family); err != nil {
			return err
		}
	}
	return nil
}
