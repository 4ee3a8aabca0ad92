// SPDX-License-Identifier: Apache-2.0

package report

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
)

// Trust keeps the roots of the workload current, and tells meshd once they are in use.
// All fields but Log are required.
type Trust struct {
	// Take takes over a bundle; false means that a newer one is there.
	Take func(sequence uint64, roots []byte) (bool, error)
	// Acknowledged waits until Envoy verifies peers with what was taken.
	Acknowledged func(ctx context.Context) error
	// Authority is the ID of what signed the workload's certificate, and a channel that
	// is closed when that may have changed.
	Authority func() (string, <-chan struct{})
	// Log gets bundles that are not taken; nil discards.
	Log *slog.Logger
}

// trustAgain is the pause before a stream that ended is opened again.
const trustAgain = 5 * time.Second

// Talk talks to meshd on a connection that others use too, until ctx ends. A meshd that
// does not know of this is left alone.
func (t *Trust) Talk(ctx context.Context, conn grpc.ClientConnInterface) {
	for said := ""; ; {
		err := t.talk(ctx, api.NewWorkloadsClient(conn))
		if ctx.Err() != nil || status.Code(err) == codes.Unimplemented {
			return
		}
		if reason := fmt.Sprint(err); reason != said && t.Log != nil {
			said = reason
			t.Log.Warn("roots are not kept current, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(trustAgain):
		}
	}
}

func (t *Trust) talk(ctx context.Context, client api.WorkloadsClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Trust(ctx)
	if err != nil {
		return err
	}
	bundles, failed := make(chan *api.TrustBundle), make(chan error, 1)
	go func() {
		for {
			b, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case bundles <- b:
			case <-ctx.Done():
				return
			}
		}
	}()
	// What is being waited for; a newer bundle ends it.
	var newest *api.TrustBundle
	results := make(chan taken)
	forget := context.CancelFunc(func() {})
	defer func() { forget() }()
	var state, said api.TrustState
	for first := true; ; first = false {
		authority, changed := t.Authority()
		state.Authority = authority
		if first || !proto.Equal(&state, &said) {
			if err := stream.Send(&state); err != nil {
				return <-failed
			}
			proto.Reset(&said)
			proto.Merge(&said, &state)
		}
		select {
		case err := <-failed:
			return err
		case <-changed:
		case b := <-bundles:
			forget()
			waiting, end := context.WithCancel(ctx)
			forget, newest = end, b
			go t.take(waiting, b, results)
		case one := <-results:
			if one.bundle != newest {
				continue
			}
			if state.Problem = one.problem; one.problem == "" {
				state.Digest = one.digest
			}
		}
	}
}

// taken is how a bundle was taken: in use, unless there is a problem.
type taken struct {
	bundle          *api.TrustBundle
	digest, problem string
}

func (t *Trust) take(ctx context.Context, b *api.TrustBundle, out chan<- taken) {
	sum := sha256.Sum256(b.GetRoots())
	one := taken{bundle: b, digest: hex.EncodeToString(sum[:])}
	ok, err := t.Take(b.GetSequence(), b.GetRoots())
	switch {
	case err != nil:
	case !ok:
		err = fmt.Errorf("bundle %d is older than what another meshd has told", b.GetSequence())
	default:
		err = t.Acknowledged(ctx)
	}
	if err != nil {
		one.problem = err.Error()
	}
	if err != nil && ctx.Err() == nil && t.Log != nil {
		t.Log.Warn("roots are not in use", "sequence", b.GetSequence(), "error", err)
	}
	select {
	case <-ctx.Done(): // there is a newer one
	case out <- one:
	}
}
