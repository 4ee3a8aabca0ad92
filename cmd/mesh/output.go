// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"
)

// listing is what a verb prints: the object of the API, and how it looks as a
// table.
type listing struct {
	object proto.Message // -o json, yaml
	table  table         // -o table, wide
	names  []string      // -o name, for example "cluster/east"
	empty  string        // said on stderr when the table has no rows
}

// print writes l in the chosen output.
func (s *session) print(l *listing) error {
	switch s.output {
	case "json":
		return writeJSON(s.stdout, l.object)
	case "yaml":
		return writeYAML(s.stdout, l.object)
	case "name":
		for _, n := range l.names {
			fmt.Fprintln(s.stdout, printable(n))
		}
		return nil
	}
	if len(l.table.rows) == 0 {
		fmt.Fprintln(s.stderr, l.empty)
		return nil
	}
	if s.output != "wide" {
		// Said once, also where the list is watched.
		if hidden := l.table.fit(s.columns(s.stdout)); len(hidden) > 0 && !s.noHeaders {
			defer fmt.Fprintln(s.stderr, s.style(s.stderr).paint(faint, "too narrow for "+strings.Join(hidden, ", ")+": -o wide has them"))
		}
	}
	return l.table.write(s.stdout, s.style(s.stdout), s.output == "wide", !s.noHeaders)
}

// watchInterval is how often -w asks again.
const watchInterval = 2 * time.Second

// printWatched prints what fetch returns; with watch it goes on, printing rows
// that are new or changed, until the command is interrupted.
func (s *session) printWatched(ctx context.Context, watch bool, fetch func(context.Context) (*listing, error)) error {
	l, err := fetch(ctx)
	if err != nil {
		return err
	}
	if !watch {
		return s.print(l)
	}
	if s.output != "table" && s.output != "wide" {
		return usagef("--watch goes with -o table or wide, not with %q", s.output)
	}
	if err := s.print(l); err != nil {
		return err
	}
	s.noHeaders = true
	seen := rowSet(l)
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return errInterrupted
		case <-ticker.C:
		}
		if l, err = fetch(ctx); err != nil {
			return err
		}
		now := rowSet(l)
		l.table.rows = slices.DeleteFunc(l.table.rows, func(row []cell) bool { return seen[rowKey(l, row)] })
		seen = now
		if len(l.table.rows) == 0 {
			continue
		}
		if err := s.print(l); err != nil {
			return err
		}
	}
}

func rowSet(l *listing) map[string]bool {
	set := make(map[string]bool, len(l.table.rows))
	for _, row := range l.table.rows {
		set[rowKey(l, row)] = true
	}
	return set
}

// rowKey leaves out the columns that change by the clock alone.
func rowKey(l *listing, row []cell) string {
	var b strings.Builder
	for i, c := range row {
		if head := l.table.columns[i].head; head != "AGE" && head != "LAG" && head != "CREDENTIALS" && head != "CERTIFICATE" {
			b.WriteString(c.text + "\x00")
		}
	}
	return b.String()
}

// writeJSON prints the API's own JSON. protojson spaces its output differently
// from build to build on purpose, so it is laid out anew.
func writeJSON(w io.Writer, m proto.Message) error {
	data, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, data, "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = w.Write(b.Bytes())
	return err
}

func writeYAML(w io.Writer, m proto.Message) error {
	data, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return err
	}
	out, err := yaml.JSONToYAML(data)
	if err != nil {
		return err
	}
	_, err = w.Write(out)
	return err
}

// age is how long ago t was, as kubectl writes it; "" if t is absent.
func (s *session) age(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return short(s.now().Sub(t.AsTime()))
}

// short writes a duration with one or two units.
func short(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 10*time.Minute:
		if sec := int(d.Seconds()) % 60; sec != 0 {
			return fmt.Sprintf("%dm%ds", int(d.Minutes()), sec)
		}
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 3*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// lag writes a delay: tenths below ten seconds.
func lag(d *durationpb.Duration) string {
	if d == nil {
		return ""
	}
	v := max(d.AsDuration(), 0)
	if v < 10*time.Second {
		return strconv.FormatFloat(v.Seconds(), 'f', 1, 64) + "s"
	}
	return short(v)
}

// count writes a number with a comma every three digits.
func count(n int32) string {
	digits := strconv.Itoa(int(n))
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// noun is "1 cluster", "2 clusters".
func noun(n int, singular string) string { return counted(int32(n), singular) }

// counted is "1 service", "1,904 services".
func counted(n int32, singular string) string {
	if n == 1 {
		return "1 " + singular
	}
	return count(n) + " " + singular + "s"
}
