// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"html/template"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// shop is the front end of the demo: its page asks the services behind it, and shows where
// each answer came from.
type shop struct {
	place    Place
	backends []backend
	client   *http.Client
}

// backend is a service of the shop.
type backend struct{ Name, URL string }

// visit is what one backend answered.
type visit struct {
	backend
	Answer Answer        `json:"answer"`
	Took   time.Duration `json:"took"`
	Err    string        `json:"error,omitempty"`
}

func shopCommand() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use: "shop NAME=URL…", Short: "the demo's front end", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			// A connection for each question, so that every visit is balanced anew.
			s := &shop{place: here(), client: &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}}
			for _, arg := range args {
				name, raw, ok := strings.Cut(arg, "=")
				if _, err := url.Parse(raw); err != nil || !ok {
					return fmt.Errorf("%q: want NAME=URL", arg)
				}
				s.backends = append(s.backends, backend{name, raw})
			}
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return err
			}
			return serveUntil(cmd.Context(), &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second}, l)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", ":8080", "address to listen on")
	return cmd
}

func (s *shop) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /json", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(s.ask(r.Context())); err != nil {
			return // the visitor has left
		}
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		if err := shopPage.Execute(w, map[string]any{"Here": s.place, "Visits": s.ask(r.Context()), "At": time.Now().Format("15:04:05")}); err != nil {
			return
		}
	})
	return mux
}

// ask visits every backend, one after the other.
func (s *shop) ask(ctx context.Context) []visit {
	var visits []visit
	for _, b := range s.backends {
		v := visit{backend: b}
		start := time.Now()
		u, err := url.Parse(b.URL)
		if err == nil {
			d := &httpDialect{c: &caller{url: u, body: "hello"}, client: s.client, url: b.URL}
			v.Answer, err = d.call(ctx)
		}
		v.Took = time.Since(start)
		if err != nil {
			v.Err = err.Error()
		}
		visits = append(visits, v)
	}
	return visits
}

var shopPage = template.Must(template.New("shop").Funcs(template.FuncMap{
	"ms": func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) },
}).Parse(`<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="2">
<title>The shop</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; color-scheme: light dark }
 h1 { font-weight: 600; margin-bottom: 0 } p { margin-top: .25rem; opacity: .75 }
 table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 500; opacity: .7 }
 td, th { padding: .5rem .75rem .5rem 0; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
 .where { font-weight: 600 } .bad { color: #b3261e } code { font-size: .85em }
</style>
<h1>The shop</h1>
<p>Front end in cluster <b>{{.Here.Cluster}}</b>, pod <code>{{.Here.Pod}}</code>, {{.At}}</p>
<table>
<tr><th>service</th><th>answered from</th><th>by</th><th>the callee saw</th><th>in</th></tr>
{{range .Visits}}<tr>
 <td>{{.Name}}</td>
 {{if .Err}}<td class="bad" colspan="3">{{.Err}}</td>{{else}}
 <td class="where">{{or .Answer.Cluster "virtual machine"}}</td><td><code>{{.Answer.Pod}}</code></td><td><code>{{.Answer.Peer}}</code></td>{{end}}
 <td>{{ms .Took}}</td>
</tr>{{end}}
</table>
</html>
`))
