// SPDX-License-Identifier: Apache-2.0

package kubelet_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/kubelet"
)

// programVar makes the test binary play the program of an image.
const programVar = "KUBELET_TEST_PROGRAM"

func TestMain(m *testing.M) {
	kubelet.Shim()
	switch os.Getenv(programVar) {
	case "web":
		playWeb()
		return
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // the tests that need namespaces skip themselves and say why
	}
	bed.Main(m)
}

// playWeb is a small web server on port 8080. It answers with its host name at
// /, with a file at /file?name=, with a variable at /env?name=, is told its
// readiness at /set?ready=, and ends after $LINGER on SIGTERM.
func playWeb() {
	var unready atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		host, _ := os.Hostname()
		fmt.Fprint(w, host)
	})
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		data, err := os.ReadFile(r.FormValue("name"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = w.Write(data)
	})
	mux.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, os.Getenv(r.FormValue("name"))) })
	mux.HandleFunc("/set", func(_ http.ResponseWriter, r *http.Request) { unready.Store(r.FormValue("ready") != "true") })
	mux.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if unready.Load() {
			http.Error(w, "unready", http.StatusServiceUnavailable)
		}
	})
	listener, err := net.Listen("tcp", ":8080")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("serving as", os.Getpid(), strings.Join(os.Args[1:], " "))
	server := http.Server{Handler: mux}
	term, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		<-term.Done()
		fmt.Println("asked to end")
		linger, _ := time.ParseDuration(os.Getenv("LINGER"))
		time.Sleep(linger)
		server.Close()
	}()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintln(os.Stderr, err)
	}
}
