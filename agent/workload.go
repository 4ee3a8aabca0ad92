// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/agent/identity"
	"github.com/isthmus-mesh/isthmus/ca/workloadapi"
)

// newWorkloadAPI serves the agent's identity to the workload. In a pod the volume
// of the socket says who may ask; a machine has other users, so that they are named.
func (a *Agent) newWorkloadAPI() *workloadapi.Server {
	s := &workloadapi.Server{Source: served{a.keeper}, Tokens: a.tokens, Users: a.config.WorkloadUsers, Log: a.log}
	if s.Users == nil && a.config.Role == VM {
		s.Users = []uint32{0, uint32(os.Geteuid())}
	}
	return s
}

// served is what the keeper has, as the workload gets it.
type served struct{ *identity.Keeper }

// SVID implements workloadapi.Source.
func (s served) SVID() (workloadapi.SVID, error) {
	cert, err := s.Current()
	if err != nil {
		if code := status.Code(err); code == codes.PermissionDenied || code == codes.Unauthenticated {
			return workloadapi.SVID{}, fmt.Errorf("%w: %w", workloadapi.ErrNoIdentity, err)
		}
		return workloadapi.SVID{}, fmt.Errorf("%w: %w", workloadapi.ErrStarting, err)
	}
	if !cert.ValidAt(time.Now()) {
		return workloadapi.SVID{}, fmt.Errorf("%w: the last one ended at %s", workloadapi.ErrStarting, cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	key, _ := pem.Decode(cert.KeyPEM)
	svid := workloadapi.SVID{ID: cert.URI(), Chain: cert.TLS.Certificate, Key: key.Bytes}
	for block, rest := pem.Decode(s.Roots()); block != nil; block, rest = pem.Decode(rest) {
		svid.Roots = append(svid.Roots, block.Bytes)
	}
	return svid, nil
}

// makeWorkloadDir makes a folder that the workload can enter, whatever the umask of who
// started us. One that is there is somebody else's, and stays as it is.
func makeWorkloadDir(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return errors.Join(os.MkdirAll(path, 0o755), os.Chmod(path, 0o755))
}

// listenWorkload opens the socket for the workload. Its mode lets everybody in who
// can enter the folder; who is served is decided by what the kernel says of the peer.
func listenWorkload(ctx context.Context, path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("workload socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("workload socket %s: there is a %v of that name; want a path that is free", path, info.Mode())
	default:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove former workload socket: %w", err)
		}
	}
	if err := makeWorkloadDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("folder of the workload socket: %w", err)
	}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the workload: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fmt.Errorf("open workload socket to the workload: %w", err)
	}
	return l, nil
}
