// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// patience is how long no meshd may answer before an Envoy that has nothing gets what was accepted last.
const patience = 5 * time.Second

// opening is the upstream stream, once there is one.
type opening struct {
	stream grpc.ClientStream
	err    error
}

// open waits for meshd. If it had to look at Envoy's first message meanwhile, that is to be carried first. An Envoy
// that holds nothing while no meshd answers gets what is remembered; then its stream ends when meshd is there, and it
// comes back with what it holds.
func (r *Relay) open(ctx context.Context, conn *grpc.ClientConn, envoy grpc.ServerStream, d dialect) (grpc.ClientStream, *frame, error) {
	opened := make(chan opening, 1)
	go func() {
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, d.method, grpc.WaitForReady(true))
		opened <- opening{stream, err}
	}()
	wait := func(first *frame) (grpc.ClientStream, *frame, error) {
		o := <-opened
		return o.stream, first, o.err
	}
	if r.Memory == nil || d.method != incremental.method {
		return wait(nil)
	}
	select {
	case o := <-opened:
		return o.stream, nil, o.err
	case <-time.After(r.patience()):
	}
	if r.Memory.empty() {
		return wait(nil)
	}
	var first frame
	if err := envoy.RecvMsg(&first); err != nil {
		return nil, nil, err
	}
	if holds(first.data) {
		return wait(&first)
	}
	return nil, nil, r.recall(ctx, envoy, &first, opened)
}

func (r *Relay) patience() time.Duration {
	if r.Patience == 0 {
		return patience
	}
	return r.Patience
}

// FromMemory tells whether Envoy has what an earlier run of the agent remembered, for want of a meshd.
func (r *Relay) FromMemory() bool { return r.recalling.Load() > 0 }

// recall answers one stream of Envoy's until meshd does.
func (r *Relay) recall(ctx context.Context, envoy grpc.ServerStream, first *frame, opened <-chan opening) error {
	r.recalling.Add(1)
	defer r.recalling.Add(-1)
	r.Log.Warn("no meshd answers: envoy gets the configuration that it accepted last", "server", r.Servers.String(), "saved", r.Memory.saved(), "error", r.lastFailure())
	r.recallNames()
	frames, failed := make(chan *frame), make(chan error, 1)
	go func() {
		for {
			f := new(frame)
			if err := envoy.RecvMsg(f); err != nil {
				failed <- err
				return
			}
			select {
			case frames <- f:
			case <-ctx.Done():
				return
			}
		}
	}()
	x := &exchange{relay: r, dialect: incremental, envoy: envoy}
	begun := map[string]bool{}
	for f, count := first, 1; ; count++ {
		if err := x.recall(f, begun, strconv.Itoa(count)); err != nil {
			return err
		}
		select {
		case o := <-opened:
			if o.err != nil {
				return o.err
			}
			return status.Error(codes.Unavailable, "meshd answers again")
		case err := <-failed:
			return err
		case f = <-frames:
		}
	}
}

// recall answers one request from memory.
func (x *exchange) recall(f *frame, begun map[string]bool, nonce string) error {
	url, err := text(f.data, x.dialect.requestType)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	kind := string(url)
	x.note(kind, f.data)
	named, all := []string{}, false
	err = each(f.data, fieldDeltaRequestSubscribe, func(name []byte) error {
		if string(name) == "*" {
			all = true
		} else {
			named = append(named, string(name))
		}
		return nil
	})
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	// The first request that names nothing wants everything.
	all = all || !begun[kind] && len(named) == 0
	begun[kind] = true
	if !all && len(named) == 0 {
		return nil // an acknowledgement
	}
	set := map[string]bool{}
	for _, name := range named {
		set[name] = true
	}
	answer := x.relay.Memory.response(kind, nonce, func(name string) bool { return all || set[name] }, named)
	return x.envoy.SendMsg(&frame{data: answer})
}

// recallNames hands on the remembered name table, unless one has come since.
func (r *Relay) recallNames() {
	if len(r.heldNames()) > 0 {
		return
	}
	answer, err := incremental.answer(r.Memory.response(NameTableType, "", func(string) bool { return true }, nil))
	if err != nil {
		r.Log.Warn("the remembered name table is not usable", "error", err)
		return
	}
	r.take(answer)
}
