// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Issuer turns a PEM certificate request into a chain: leaf first, root last.
// The current certificate, if given, is the only credential of that request; a
// refusal of it is ErrRefused. Without it the Issuer uses what else it has.
type Issuer interface {
	Issue(ctx context.Context, csr []byte, current *Certificate) (chain []string, err error)
}

// Keeper holds the workload's certificate and renews it. The zero value with
// an Issuer works; fields must not change after Run was called.
type Keeper struct {
	// Issuer is asked for certificates.
	Issuer Issuer
	// Store, if set, keeps the certificate across restarts.
	Store *Store
	// RootsFile, if set, is a PEM bundle that is trusted besides the roots of
	// the answer and is read again whenever it changes: in Kubernetes the
	// mounted ConfigMap, which is how a new root arrives before its first leaf.
	RootsFile string
	// FirstRootsFile, if set, is a PEM bundle that is trusted only until the
	// first answer brings its own: on a machine outside Kubernetes nobody keeps
	// the file current, so a retired root must not live on in it.
	FirstRootsFile string
	// Log gets renewals, refusals and their reasons; nil discards.
	Log *slog.Logger
	// Jitter returns a number in [0,1) that spreads renewals; nil is random.
	Jitter func() float64

	mu        sync.Mutex
	current   *Certificate
	fileRoot  []byte
	firstRoot []byte
	told      toldRoots
	failure   error
	changed   chan struct{}
	asked     chan struct{} // closed when Renew was called
	now       func() time.Time
	firstKey  crypto.Signer // only used by Run
}

// rootsInterval is how often RootsFile is looked at. A ConfigMap takes the
// kubelet about a minute anyway.
const rootsInterval = 10 * time.Second

// longestSleep bounds timers, because a suspended machine stops monotonic time
// but not the certificate's.
const longestSleep = time.Minute

// Run obtains and renews until ctx ends, and then returns nil.
func (k *Keeper) Run(ctx context.Context) error {
	if k.Log == nil {
		k.Log = slog.New(slog.DiscardHandler)
	}
	k.restore()
	k.readRoots()
	k.readFirstRoots()
	var watching sync.WaitGroup
	defer watching.Wait()
	if k.RootsFile != "" {
		watching.Go(func() { k.watchRoots(ctx) })
	}
	for ctx.Err() == nil {
		if cert := k.peek(); cert != nil && !k.sleepUntil(ctx, k.renewAt(cert)) {
			return nil
		}
		k.obtain(ctx)
	}
	return nil
}

// Renew renews now instead of at the time that the certificate's life sets, by the same
// way: for who has exchanged a root or suspects a key.
func (k *Keeper) Renew() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.asked == nil {
		k.asked = make(chan struct{})
	}
	select {
	case <-k.asked:
	default:
		close(k.asked)
	}
}

// early is closed once a renewal was asked for; the certificate that comes then answers it.
func (k *Keeper) early() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.asked == nil {
		k.asked = make(chan struct{})
	}
	return k.asked
}

// Current returns the certificate, or ErrNoCertificate with the reason why the
// last attempt failed. It also returns a certificate that has expired: whoever
// uses it gets a clearer refusal than silence.
func (k *Keeper) Current() (*Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current != nil {
		return k.current, nil
	}
	if k.failure != nil {
		return nil, errors.Join(ErrNoCertificate, k.failure)
	}
	return nil, ErrNoCertificate
}

// Roots returns the PEM bundle to verify peers with: what was told last, by
// Trust, with an answer, or by RootsFile. Before the first of Trust's it is all
// there is. It is empty when nothing exists yet.
func (k *Keeper) Roots() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current == nil {
		return Bundle(k.fileRoot, k.firstRoot)
	}
	if k.told.roots != nil {
		return Bundle(k.told.roots, k.told.answer, k.told.file)
	}
	return Bundle(k.current.RootsPEM, k.fileRoot)
}

// Changed returns a channel that is closed at the next change of certificate
// or roots. Take it before reading, so that no change is missed.
func (k *Keeper) Changed() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.changed == nil {
		k.changed = make(chan struct{})
	}
	return k.changed
}

// Wait returns the certificate as soon as there is one.
func (k *Keeper) Wait(ctx context.Context) (*Certificate, error) {
	for {
		changed := k.Changed()
		cert, err := k.Current()
		if err == nil {
			return cert, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
	}
}

func (k *Keeper) peek() *Certificate {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.current
}

func (k *Keeper) clock() time.Time {
	if k.now != nil {
		return k.now()
	}
	return time.Now()
}

// restore takes up the certificate of the last run, if it is still valid.
func (k *Keeper) restore() {
	if k.Store == nil {
		return
	}
	cert, err := k.Store.Load()
	switch {
	case errors.Is(err, ErrNoCertificate):
	case err != nil:
		k.Log.Warn("stored certificate is unusable, a new one is needed", "error", err)
	case !cert.ValidAt(k.clock()):
		k.Log.Warn("stored certificate has expired, a token is needed", "expired", cert.Leaf.NotAfter)
	default:
		k.Log.Info("certificate restored", "id", cert.URI(), "expires", cert.Leaf.NotAfter)
		k.set(cert)
	}
}

// renewAt is around half of the life that remained when the certificate came:
// between 45 and 55 %, so that workloads started together drift apart.
func (k *Keeper) renewAt(cert *Certificate) time.Time {
	from := cert.Obtained
	if from.IsZero() {
		from = cert.Leaf.NotBefore
	}
	jitter := rand.Float64
	if k.Jitter != nil {
		jitter = k.Jitter
	}
	life := cert.Leaf.NotAfter.Sub(from)
	return from.Add(time.Duration(float64(life) * (0.45 + 0.1*jitter())))
}

// sleepUntil returns false when ctx ended first. A wish to renew ends the sleep.
func (k *Keeper) sleepUntil(ctx context.Context, t time.Time) bool {
	early := k.early()
	for {
		d := t.Sub(k.clock())
		if d <= 0 {
			return ctx.Err() == nil
		}
		select {
		case <-ctx.Done():
			return false
		case <-early:
			return ctx.Err() == nil
		case <-time.After(min(d, longestSleep)):
		}
	}
}

// obtain tries until it has a new certificate or ctx ends.
func (k *Keeper) obtain(ctx context.Context) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval = 250 * time.Millisecond
	wait.MaxInterval = 15 * time.Second
	began, reported := k.clock(), ""
	for attempt := 1; ; attempt++ {
		err := k.once(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		k.fail(err)
		// The same refusal again is not news; a new one, or a long wait, is.
		if reason := err.Error(); reason != reported || attempt%20 == 0 {
			reported = reason
			k.Log.Warn("no certificate obtained, trying again", k.failureAttributes(err, attempt, began)...)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait.NextBackOff()):
		}
	}
}

func (k *Keeper) failureAttributes(err error, attempt int, began time.Time) []any {
	attributes := []any{"error", err, "attempt", attempt, "since", began.UTC().Format(time.RFC3339)}
	if cert := k.peek(); cert != nil {
		attributes = append(attributes, "id", cert.URI(), "present_expires", cert.Leaf.NotAfter)
	}
	return attributes
}

// once renews by certificate while there is a valid one, and falls back to the
// other credential where that is refused.
func (k *Keeper) once(ctx context.Context) error {
	if cert := k.peek(); cert != nil && cert.ValidAt(k.clock()) {
		key, err := newKey()
		if err != nil {
			return err
		}
		err = k.issue(ctx, key, cert)
		if !errors.Is(err, ErrRefused) {
			return err
		}
		if fallback := k.first(ctx); fallback != nil {
			return errors.Join(err, fallback)
		}
		return nil
	}
	return k.first(ctx)
}

// first asks without a certificate. The key is made once and kept: the service
// binds a token to the first key it came with, and we may have to ask again
// with the same token after a restart.
func (k *Keeper) first(ctx context.Context) error {
	if k.firstKey == nil && k.Store != nil {
		k.firstKey = k.Store.LoadKey()
	}
	if k.firstKey == nil {
		key, err := newKey()
		if err != nil {
			return err
		}
		if k.Store != nil {
			if err := k.Store.SaveKey(key); err != nil {
				k.Log.Warn("key not kept on disk: after a restart the token may be refused", "error", err)
			}
		}
		k.firstKey = key
	}
	return k.issue(ctx, k.firstKey, nil)
}

func (k *Keeper) issue(ctx context.Context, key crypto.Signer, current *Certificate) error {
	csr, err := request(key)
	if err != nil {
		return err
	}
	chain, err := k.Issuer.Issue(ctx, csr, current)
	if err != nil {
		return err
	}
	cert, err := assemble(key, chain)
	if err != nil {
		return err
	}
	cert.Obtained = k.clock()
	if !k.mature(ctx, cert) {
		return ctx.Err()
	}
	k.keep(cert)
	k.set(cert)
	k.Log.Info("certificate obtained", "id", cert.URI(), "serial", cert.Leaf.SerialNumber.Text(16), "expires", cert.Leaf.NotAfter)
	return nil
}

// mature keeps the present certificate in use, as long as it lives, while the
// new one is not valid yet by the clock here: peers with a clock like it would
// refuse the new one. It returns false if ctx ended first.
func (k *Keeper) mature(ctx context.Context, cert *Certificate) bool {
	present := k.peek()
	if present == nil || !present.ValidAt(k.clock()) {
		return true // late is better than none
	}
	until := cert.Leaf.NotBefore
	if present.Leaf.NotAfter.Before(until) {
		until = present.Leaf.NotAfter
	}
	if d := until.Sub(k.clock()); d > 0 {
		k.Log.Warn("the new certificate is not valid yet: this clock is late, or meshd's is early; the present one stays",
			"valid_in", d, "present_expires", present.Leaf.NotAfter)
	}
	for d := until.Sub(k.clock()); d > 0; d = until.Sub(k.clock()) {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(min(d, longestSleep)):
		}
	}
	return true
}

// keep writes to disk. A full disk must not take a running workload down, so
// the new certificate is used anyhow.
func (k *Keeper) keep(cert *Certificate) {
	if k.Store == nil {
		return
	}
	if err := k.Store.Save(cert); err != nil {
		k.Log.Error("certificate not kept on disk: a reboot would need a new token", "error", err)
	}
}

func (k *Keeper) set(cert *Certificate) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.told.roots != nil {
		k.told.answer = cert.RootsPEM
	}
	k.current, k.failure, k.asked = cert, nil, nil
	k.wakeLocked()
}

func (k *Keeper) fail(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failure = err
}

func (k *Keeper) wakeLocked() {
	if k.changed != nil {
		close(k.changed)
		k.changed = nil
	}
}
