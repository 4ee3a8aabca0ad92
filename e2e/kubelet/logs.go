// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// maxLogLine is where a longer line is split, as container runtimes do.
const maxLogLine = 16 << 10

// containerLog keeps what one run of a container wrote, in the format of the
// Container Runtime Interface: time, stream, F (full) or P (partial), text.
type containerLog struct {
	mu     sync.Mutex
	file   *os.File
	path   string
	closed bool
	grown  chan struct{} // closed and replaced at each write
	now    func() time.Time
}

func createLog(path string, now func() time.Time) (*containerLog, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	return &containerLog{file: file, path: path, grown: make(chan struct{}), now: now}, nil
}

// stream gives a writer for stdout or stderr. It is for one goroutine.
func (l *containerLog) stream(name string) *logStream { return &logStream{log: l, name: name} }

func (l *containerLog) append(stream, tag string, text []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	_, err := fmt.Fprintf(l.file, "%s %s %s %s\n", l.now().UTC().Format(time.RFC3339Nano), stream, tag, text)
	close(l.grown)
	l.grown = make(chan struct{})
	return err
}

// Close ends the log; followers see its end.
func (l *containerLog) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	close(l.grown)
	return l.file.Close()
}

// state tells whether more may come, and a channel that is closed when it came.
func (l *containerLog) state() (closed bool, grown <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed, l.grown
}

// logStream cuts what is written into lines.
type logStream struct {
	log  *containerLog
	name string
	rest []byte
}

func (s *logStream) Write(p []byte) (int, error) {
	s.rest = append(s.rest, p...)
	for {
		end := bytes.IndexByte(s.rest, '\n')
		tag, skip := "F", 1
		if end < 0 || end > maxLogLine {
			if len(s.rest) < maxLogLine {
				return len(p), nil
			}
			end, tag, skip = maxLogLine, "P", 0
		}
		if err := s.log.append(s.name, tag, s.rest[:end]); err != nil {
			return 0, err
		}
		s.rest = s.rest[end+skip:]
	}
}

// flush writes an unfinished last line.
func (s *logStream) flush() {
	if len(s.rest) > 0 {
		_ = s.log.append(s.name, "P", s.rest)
		s.rest = nil
	}
}

// logOptions are the query of `kubectl logs`.
type logOptions struct {
	Tail       int // lines; negative means all
	Follow     bool
	Previous   bool
	Timestamps bool
	Since      time.Time
	Limit      int64 // bytes; zero means no limit
}

// logLine is one parsed line of a log file.
type logLine struct {
	time time.Time
	text string // with its line end, unless it was partial
}

// parseLogLine reads one line (without its line end) of the CRI format.
func parseLogLine(line string) (logLine, error) {
	stamp, rest, _ := strings.Cut(line, " ")
	_, rest, ok := strings.Cut(rest, " ")
	tag, text, ok2 := strings.Cut(rest, " ")
	if !ok || !ok2 || tag != "F" && tag != "P" {
		return logLine{}, fmt.Errorf("log line %.40q: want time, stream, F or P, text", line)
	}
	at, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil {
		return logLine{}, fmt.Errorf("log line %.40q: %w", line, err)
	}
	if tag == "F" {
		text += "\n"
	}
	return logLine{time: at, text: text}, nil
}

// copyTo writes the wanted part of the log to w; with Follow until the log or ctx ends.
func (l *containerLog) copyTo(ctx context.Context, w io.Writer, opts logOptions) error {
	file, err := os.Open(l.path)
	if err != nil {
		return err
	}
	defer file.Close()
	if opts.Limit > 0 {
		w = &limitedWriter{w: w, left: opts.Limit}
	}
	tail := &lineTail{keep: opts.Tail, w: w, stamps: opts.Timestamps}
	reader := bufio.NewReader(file)
	var partial string
	for {
		closed, grown := l.state() // before reading: what comes later will close grown
		for {
			part, err := reader.ReadString('\n')
			partial += part
			if err != nil {
				break
			}
			line, err := parseLogLine(strings.TrimSuffix(partial, "\n"))
			partial = ""
			if err != nil || line.time.Before(opts.Since) {
				continue
			}
			if err := tail.add(line); err != nil {
				return ignoreLimit(err)
			}
		}
		if err := tail.flush(); err != nil || closed || !opts.Follow {
			return ignoreLimit(err)
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return nil
		}
	}
}

// lineTail holds back all but the last lines until the end was seen once.
type lineTail struct {
	keep   int // negative: all
	held   []logLine
	w      io.Writer
	stamps bool
	seen   bool
}

func (t *lineTail) add(line logLine) error {
	if t.keep < 0 || t.seen {
		return t.write(line)
	}
	t.held = append(t.held, line)
	if len(t.held) > t.keep {
		t.held = t.held[1:]
	}
	return nil
}

func (t *lineTail) flush() error {
	for _, line := range t.held {
		if err := t.write(line); err != nil {
			return err
		}
	}
	t.held, t.seen = nil, true
	return nil
}

func (t *lineTail) write(line logLine) error {
	text := line.text
	if t.stamps {
		text = line.time.Format(time.RFC3339Nano) + " " + text
	}
	_, err := io.WriteString(t.w, text)
	return err
}

var errLimit = errors.New("limit of bytes reached")

func ignoreLimit(err error) error {
	if errors.Is(err, errLimit) {
		return nil
	}
	return err
}

// limitedWriter passes on a number of bytes and then fails with errLimit.
type limitedWriter struct {
	w    io.Writer
	left int64
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	if int64(len(p)) <= l.left {
		l.left -= int64(len(p))
		return l.w.Write(p)
	}
	n, err := l.w.Write(p[:l.left])
	l.left = 0
	return n, errors.Join(err, errLimit)
}
