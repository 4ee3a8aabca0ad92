// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// What an audit line tells about.
const (
	AuditBegan      = "began"      // a replica opened its log
	AuditIssued     = "issued"     // a certificate left
	AuditRefused    = "refused"    // a certificate was asked for and refused
	AuditAuthority  = "authority"  // an issuer was made, activated or retired
	AuditRevoked    = "revoked"    // an instance or a source was cut off
	AuditReinstated = "reinstated" // and was let in again
)

// AuditEntry is one line of the audit log. Fields that do not apply are left out.
type AuditEntry struct {
	Sequence   uint64     `json:"seq"` // 1, 2, 3, … of one log; set by Append
	Time       time.Time  `json:"time"`
	Event      string     `json:"event"`
	Replica    string     `json:"replica,omitempty"`
	Method     string     `json:"method,omitempty"`     // kind of credential
	Credential string     `json:"credential,omitempty"` // digest of the credential
	Peer       string     `json:"peer,omitempty"`       // network address of who asked
	Source     Source     `json:"source,omitempty"`
	Instance   string     `json:"instance,omitempty"`
	SPIFFEID   string     `json:"spiffe_id,omitempty"`
	Serial     string     `json:"serial,omitempty"`
	Authority  string     `json:"authority,omitempty"` // ID of the issuer
	Epoch      int64      `json:"epoch,omitempty"`     // of the issuer
	NotBefore  *time.Time `json:"not_before,omitempty"`
	NotAfter   *time.Time `json:"not_after,omitempty"`
	Key        string     `json:"key,omitempty"`      // thumbprint of the certified key
	Audience   []string   `json:"audience,omitempty"` // of a JWT-SVID
	Reason     string     `json:"reason,omitempty"`
	Previous   string     `json:"prev"` // hash of the line before; set by Append
}

// Audit records what the authority does. An error means that nothing may be issued.
type Audit interface {
	Append(AuditEntry) error
}

// maxAuditLine is more than any line has, in bytes.
const maxAuditLine = 64 << 10

// maxAuditText bounds the texts of a line that a caller may influence.
const maxAuditText = 1024

// auditGenesis is what the first line of a log calls the line before it.
var auditGenesis = hex.EncodeToString(make([]byte, sha256.Size))

// AuditLog is an Audit in a file: JSON lines, each with the hash of the one before, appended and never changed.
// One process writes a log. Lines are with the operating system when Append returns, and survive the
// end of the process; Run brings them to disk.
type AuditLog struct {
	mu      sync.Mutex
	file    *os.File
	replica string
	clock   func() time.Time
	id      string // hash of the first line
	head    AuditHead
	last    error // of the last Append
	failed  error // a line may be half written; nothing may follow it
}

var _ Audit = (*AuditLog)(nil)

// auditSyncEvery is how much of the log a loss of power may cost.
const auditSyncEvery = 5 * time.Second

// AuditHead is the last line of a log: keep it elsewhere to notice a log that was cut short; see Checkpoints.
type AuditHead struct {
	Sequence uint64 `json:"seq"` // 0: empty
	Hash     string `json:"hash"`
	Size     int64  `json:"size"` // of the log with this line, in bytes
}

// OpenAudit opens the log at path, or begins it. The replica's name is part of every line. A last line that a
// crash left incomplete is cut off, and the line that is then written says so.
func OpenAudit(path, replica string, clock func() time.Time) (*AuditLog, error) {
	if clock == nil {
		clock = time.Now
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		file.Close()
		return nil, fmt.Errorf("audit log %s: another process writes it: %w", path, err)
	}
	l := &AuditLog{file: file, replica: replica, clock: clock}
	cut, err := l.resume()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("audit log %s: %w", path, err)
	}
	began := AuditEntry{Event: AuditBegan}
	if cut > 0 {
		began.Reason = fmt.Sprintf("the last line was incomplete: %d bytes cut off", cut)
	}
	if err := l.Append(began); err != nil {
		file.Close()
		return nil, err
	}
	return l, nil
}

// resume finds the last complete line, cuts off what follows it, and takes up the chain.
func (l *AuditLog) resume() (cut int64, err error) {
	l.head = AuditHead{Hash: auditGenesis}
	size, err := l.file.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, err
	}
	tail := make([]byte, min(size, maxAuditLine))
	if _, err := l.file.ReadAt(tail, size-int64(len(tail))); err != nil {
		return 0, err
	}
	end := bytes.LastIndexByte(tail, '\n') + 1
	if end == 0 && size > int64(len(tail)) {
		return 0, fmt.Errorf("its last line is longer than %d bytes", maxAuditLine)
	}
	if cut = int64(len(tail) - end); cut > 0 {
		if err := l.file.Truncate(size - cut); err != nil {
			return 0, err
		}
	}
	if end == 0 {
		return cut, nil
	}
	line := tail[bytes.LastIndexByte(tail[:end-1], '\n')+1 : end-1]
	entry, hash, err := parseAuditLine(line)
	if err != nil {
		return 0, fmt.Errorf("its last line: %w", err)
	}
	l.head = AuditHead{Sequence: entry.Sequence, Hash: hash, Size: size - cut}
	l.id, err = l.firstHash()
	return cut, err
}

// firstHash is the hash of the first line, which tells this log from every other.
func (l *AuditLog) firstHash() (string, error) {
	text := make([]byte, min(l.head.Size, maxAuditLine))
	if _, err := l.file.ReadAt(text, 0); err != nil {
		return "", err
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	_, hash, err := parseAuditLine(line)
	if err != nil {
		return "", fmt.Errorf("its first line: %w", err)
	}
	return hash, nil
}

// lineEndingAt reads the line whose newline is the last byte before size, and gives its sequence and hash.
func (l *AuditLog) lineEndingAt(size int64) (AuditHead, error) {
	text := make([]byte, min(size, maxAuditLine))
	if _, err := l.file.ReadAt(text, size-int64(len(text))); err != nil {
		return AuditHead{}, err
	}
	text, whole := bytes.CutSuffix(text, []byte("\n"))
	if !whole {
		return AuditHead{}, errors.New("no line ends there")
	}
	entry, hash, err := parseAuditLine(text[bytes.LastIndexByte(text, '\n')+1:])
	return AuditHead{Sequence: entry.Sequence, Hash: hash, Size: size}, err
}

// Append implements Audit. Errors wrap ErrAudit.
func (l *AuditLog) Append(e AuditEntry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = l.appendLocked(e)
	return l.last
}

func (l *AuditLog) appendLocked(e AuditEntry) error {
	if l.failed != nil {
		return fmt.Errorf("%w: since an earlier failure: %w", ErrAudit, l.failed)
	}
	e.Sequence, e.Previous, e.Replica = l.head.Sequence+1, l.head.Hash, l.replica
	if e.Time.IsZero() {
		e.Time = l.clock()
	}
	e.Time = e.Time.UTC()
	e.Reason, e.Instance, e.SPIFFEID = cutText(e.Reason), cutText(e.Instance), cutText(e.SPIFFEID)
	e.Source, e.Peer = Source(cutText(string(e.Source))), cutText(e.Peer)
	content, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAudit, err)
	}
	line, hash := sealAuditLine(content)
	if n, err := l.file.Write(line); err != nil {
		if n > 0 && l.undo(int64(n)) != nil {
			l.failed = err
		}
		return fmt.Errorf("%w: %w", ErrAudit, err)
	}
	l.head = AuditHead{Sequence: e.Sequence, Hash: hash, Size: l.head.Size + int64(len(line))}
	if l.id == "" {
		l.id = hash
	}
	return nil
}

// undo takes back a line that was written in part, as on a full disk.
func (l *AuditLog) undo(n int64) error {
	size, err := l.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	return l.file.Truncate(size - n)
}

// Head is the last line that was written.
func (l *AuditLog) Head() AuditHead {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// ID tells this log from every other: the hash of its first line.
func (l *AuditLog) ID() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.id
}

// Err is why the last line could not be written, and nil once one could.
func (l *AuditLog) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Verify reads the log as far as it goes now, and compares it with marks that were kept elsewhere.
func (l *AuditLog) Verify(marks []AuditMark) (AuditHead, error) {
	return CheckAudit(io.NewSectionReader(l.file, 0, l.Head().Size), marks)
}

// Run brings what was written to disk every few seconds until ctx ends. A failure stops issuance: a disk that
// does not take the log back is no place for one.
func (l *AuditLog) Run(ctx context.Context) error {
	ticker := time.NewTicker(auditSyncEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if err := l.file.Sync(); err != nil {
			l.mu.Lock()
			l.failed = err
			l.mu.Unlock()
			return fmt.Errorf("%w: %w", ErrAudit, err)
		}
	}
}

// Close syncs and closes the log; Append fails from then on.
func (l *AuditLog) Close() error { return errors.Join(l.file.Sync(), l.file.Close()) }

func cutText(s string) string {
	if len(s) > maxAuditText {
		return s[:maxAuditText]
	}
	return s
}

// auditHashField opens the last field of a line, which is the hash of everything before it.
const auditHashField = `,"hash":"`

// sealAuditLine turns {…} into {…,"hash":"<SHA-256 of the former>"} and a newline.
func sealAuditLine(content []byte) (line []byte, hash string) {
	hash = digest(content)
	line = append(line, content[:len(content)-1]...)
	line = append(line, auditHashField+hash+"\"}\n"...)
	return line, hash
}

// parseAuditLine checks the hash of one line, without its newline.
func parseAuditLine(line []byte) (AuditEntry, string, error) {
	const tail = len(auditHashField) + 2*sha256.Size + len(`"}`)
	var e AuditEntry
	if len(line) < tail+1 {
		return e, "", errors.New("too short")
	}
	cut := len(line) - tail
	field, ok := bytes.CutPrefix(line[cut:], []byte(auditHashField))
	if !ok || !bytes.HasSuffix(field, []byte(`"}`)) {
		return e, "", errors.New("does not end with its hash")
	}
	hash := string(field[:2*sha256.Size])
	content := append(bytes.Clone(line[:cut]), '}')
	if digest(content) != hash {
		return e, "", errors.New("its content does not match its hash")
	}
	if err := json.Unmarshal(content, &e); err != nil {
		return e, "", err
	}
	return e, hash, nil
}

// VerifyAudit reads a log from its beginning and reports the first line that was changed, inserted, removed or
// exchanged. A log that was cut short at its end is noticed by comparing the head with one that was kept.
func VerifyAudit(r io.Reader) (AuditHead, error) {
	return ReadAudit(r, func(AuditEntry) error { return nil })
}

// IdentifyAudit reads the beginning of a log and gives what AuditLog.ID gave for it.
func IdentifyAudit(r io.Reader) (string, error) {
	line, err := bufio.NewReaderSize(io.LimitReader(r, maxAuditLine), maxAuditLine).ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	_, hash, err := parseAuditLine(bytes.TrimSuffix(line, []byte("\n")))
	if err != nil {
		return "", fmt.Errorf("audit line 1: %w", err)
	}
	return hash, nil
}

// CheckAudit is VerifyAudit for a log whose heads were kept elsewhere: it also notices a log that was cut short,
// or written anew from its beginning. The marks are in order.
func CheckAudit(r io.Reader, marks []AuditMark) (AuditHead, error) {
	head, err := readAudit(r, func(_ AuditEntry, at AuditHead) error {
		if len(marks) == 0 || at.Sequence < marks[0].Sequence {
			return nil
		}
		mark := marks[0]
		marks = marks[1:]
		if at != mark.AuditHead {
			return fmt.Errorf("audit line %d: it is not the one that was kept at %s; the log was rewritten at or before it",
				at.Sequence, mark.Time.UTC().Format(time.RFC3339))
		}
		return nil
	})
	if err == nil && len(marks) > 0 {
		last := marks[len(marks)-1]
		err = fmt.Errorf("audit line %d: the log ends here, and had %d lines at %s; it was cut short",
			head.Sequence, last.Sequence, last.Time.UTC().Format(time.RFC3339))
	}
	return head, err
}

// ReadAudit is VerifyAudit that shows each line once it is verified. An error of show ends the reading.
func ReadAudit(r io.Reader, show func(AuditEntry) error) (AuditHead, error) {
	return readAudit(r, func(e AuditEntry, _ AuditHead) error { return show(e) })
}

func readAudit(r io.Reader, show func(AuditEntry, AuditHead) error) (AuditHead, error) {
	head := AuditHead{Hash: auditGenesis}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxAuditLine)
	for lines.Scan() {
		entry, hash, err := parseAuditLine(lines.Bytes())
		switch {
		case err != nil:
			return head, fmt.Errorf("audit line %d: %w", head.Sequence+1, err)
		case entry.Sequence != head.Sequence+1:
			return head, fmt.Errorf("audit line %d: it calls itself %d", head.Sequence+1, entry.Sequence)
		case entry.Previous != head.Hash:
			return head, fmt.Errorf("audit line %d: it does not follow the line before it", entry.Sequence)
		}
		head = AuditHead{Sequence: entry.Sequence, Hash: hash, Size: head.Size + int64(len(lines.Bytes())) + 1}
		if err := show(entry, head); err != nil {
			return head, err
		}
	}
	if err := lines.Err(); err != nil {
		return head, fmt.Errorf("audit line %d: %w", head.Sequence+1, err)
	}
	return head, nil
}
