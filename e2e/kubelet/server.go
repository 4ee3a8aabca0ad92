// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strconv"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// Limits of exec and port-forward streams, the kubelet's defaults.
const (
	streamIdle     = 4 * time.Hour
	streamCreation = 30 * time.Second
)

// serve answers the API server's calls for a node until ctx ends.
func (k *Kubelet) serve(ctx context.Context, n *node) error {
	if n.Listener == nil {
		return nil
	}
	certificate, err := selfSigned(n.Node)
	if err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	server := &http.Server{
		Handler:   k.handler(),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"http/1.1"}},
	}
	k.all.Go(func() {
		if err := server.ServeTLS(n.Listener, "", ""); err != nil && !errors.Is(err, http.ErrServerClosed) {
			k.Log.Error("node serves no calls any more", "node", n.Name, "error", err)
		}
	})
	context.AfterFunc(ctx, func() { server.Close() })
	return nil
}

// selfSigned makes the node's serving certificate; an API server without a
// certificate authority for kubelets accepts it.
func selfSigned(n Node) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "system:node:" + n.Name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		IPAddresses: []net.IP{n.Address.AsSlice()}, DNSNames: []string{n.Name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// handler is the part of the kubelet's API that the API server calls.
func (k *Kubelet) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", k.serveLogs)
	mux.HandleFunc("/exec/{namespace}/{pod}/{container}", k.serveExec)
	mux.HandleFunc("/portForward/{namespace}/{pod}", k.servePortForward)
	return mux
}

// worker finds a pod by name: the newest, if an old one is still ending.
func (k *Kubelet) worker(namespace, name string) (*worker, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var found *worker
	for _, w := range k.workers {
		pod := w.newest()
		if pod.Namespace != namespace || pod.Name != name {
			continue
		}
		if found == nil || found.newest().CreationTimestamp.Before(&pod.CreationTimestamp) {
			found = w
		}
	}
	if found == nil {
		return nil, fmt.Errorf("pod %s/%s is not on this node", namespace, name)
	}
	return found, nil
}

// containerOf finds the container that a request's path names.
func (k *Kubelet) containerOf(r *http.Request) (*container, error) {
	return k.container(r.PathValue("namespace"), r.PathValue("pod"), r.PathValue("container"))
}

func (k *Kubelet) serveLogs(w http.ResponseWriter, r *http.Request) {
	options, err := parseLogOptions(r.URL.Query(), time.Now())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c, err := k.containerOf(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	log, err := c.logOf(options.Previous)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if err := log.copyTo(r.Context(), flushed{w, http.NewResponseController(w)}, options); err != nil {
		k.Log.Debug("log is not served to its end", "error", err)
	}
}

// flushed sends what is written at once.
type flushed struct {
	io.Writer
	control *http.ResponseController
}

func (f flushed) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	return n, errors.Join(err, f.control.Flush())
}

// parseLogOptions reads the query of a request for logs, see corev1.PodLogOptions.
func parseLogOptions(query url.Values, now time.Time) (logOptions, error) {
	options := logOptions{Tail: -1}
	for name, set := range map[string]func(string) error{
		"follow":     func(s string) (err error) { options.Follow, err = strconv.ParseBool(s); return },
		"previous":   func(s string) (err error) { options.Previous, err = strconv.ParseBool(s); return },
		"timestamps": func(s string) (err error) { options.Timestamps, err = strconv.ParseBool(s); return },
		"limitBytes": func(s string) (err error) { options.Limit, err = strconv.ParseInt(s, 10, 64); return },
		"tailLines":  func(s string) (err error) { options.Tail, err = strconv.Atoi(s); return },
		"sinceTime":  func(s string) (err error) { options.Since, err = time.Parse(time.RFC3339, s); return },
		"sinceSeconds": func(s string) error {
			seconds, err := strconv.ParseInt(s, 10, 32)
			options.Since = now.Add(-time.Duration(seconds) * time.Second)
			return err
		},
	} {
		value := query.Get(name)
		if value == "" {
			continue
		}
		if err := set(value); err != nil {
			return logOptions{}, fmt.Errorf("%s: %w", name, err)
		}
	}
	return options, nil
}

func (k *Kubelet) serveExec(w http.ResponseWriter, r *http.Request) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c, err := k.containerOf(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	command := r.URL.Query()["command"]
	if len(command) == 0 {
		http.Error(w, "command: at least one word is needed", http.StatusBadRequest)
		return
	}
	remotecommand.ServeExec(w, r, executor{c}, r.PathValue("pod"), "", c.spec.Name, command, options,
		streamIdle, streamCreation, remotecommand.SupportedStreamingProtocols)
}

// executor runs commands for `kubectl exec`.
type executor struct{ c *container }

// ExecInContainer implements remotecommand.Executor.
func (e executor) ExecInContainer(ctx context.Context, _, _, _ string, command []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	x := execution{Args: command, Stdin: in}
	if !tty {
		if out != nil {
			x.Stdout = out
		}
		if errOut != nil {
			x.Stderr = errOut
		}
		return exitError(e.c.exec(ctx, x))
	}
	t, err := openTerminal()
	if err != nil {
		return err
	}
	defer t.outside.Close()
	x.Stdin, x.Terminal = nil, t
	go func() {
		for size := range resize {
			_ = t.resize(size.Width, size.Height)
		}
	}()
	if in != nil {
		go func() { _, _ = io.Copy(t.outside, in) }()
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(out, t.outside) // ends with EIO when the last process has closed the terminal
	}()
	err = e.c.exec(ctx, x)
	select {
	case <-copied:
	case <-time.After(time.Second): // a child keeps the terminal open
	}
	return exitError(err)
}

// exitError turns the failure of a command that ran into what remotecommand reports as its exit code.
func exitError(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	return utilexec.CodeExitError{Err: err, Code: exitOf(exit.ProcessState).Code}
}

func (k *Kubelet) servePortForward(w http.ResponseWriter, r *http.Request) {
	pod, err := k.worker(r.PathValue("namespace"), r.PathValue("pod"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	options, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	portforward.ServePortForward(w, r, forwarder{pod}, r.PathValue("pod"), "", options,
		streamIdle, streamCreation, portforward.SupportedProtocols)
}

// forwarder connects `kubectl port-forward` with a pod's loopback interface.
type forwarder struct{ w *worker }

// PortForward implements portforward.PortForwarder.
func (f forwarder) PortForward(ctx context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	if len(f.w.facts().PodIPs) == 0 {
		return errors.New("pod has no network yet")
	}
	conn, err := dialIn(ctx, f.w.namespace.Path(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	defer conn.Close()
	done := make(chan error, 2)
	go func() {
		_, err := io.Copy(conn, stream)
		if half, ok := conn.(*net.TCPConn); ok {
			_ = half.CloseWrite()
		}
		done <- err
	}()
	go func() {
		_, err := io.Copy(stream, conn)
		done <- err
		done <- nil // the answer's end is the end, also if the client keeps its side open
	}()
	return errors.Join(<-done, <-done)
}
