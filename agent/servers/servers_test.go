// SPDX-License-Identifier: Apache-2.0

package servers_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"meshd:15012":                    "meshd:15012",
		"a:1, b:2,a:1":                   "a:1,b:2",
		"[fd00::1]:15012,10.0.0.1:15012": "[fd00::1]:15012,10.0.0.1:15012",
		"meshd":                          "", "a:1,": "", ":15012": "", "a:": "", "": "",
	} {
		got, err := servers.Parse(text)
		if want == "" && !errors.Is(err, servers.ErrAddress) || want != "" && (err != nil || got.String() != want) {
			t.Errorf("%q: %v, %v; want %q", text, got, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("a:1,b:2")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := servers.Parse(text)
		if err != nil {
			return
		}
		if again, err := servers.Parse(list.String()); err != nil || again.String() != list.String() {
			t.Errorf("%q: %q, then %q, %v", text, list, again, err)
		}
	})
}

// replica serves with a certificate for one name.
func replica(t *testing.T, authority *catest.CA, name string) (address string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(authority.ServerTLS(t, name))))
	healthv1.RegisterHealthServer(server, health.NewServer())
	go server.Serve(l)
	t.Cleanup(server.Stop)
	return l.Addr().String(), server.Stop
}

// Replicas that are dead, or that take connections and then say nothing, are passed over;
// each is verified by its own name; and when the one that answered dies, another does.
func TestAnyReplicaThatAnswersWillDo(t *testing.T) {
	t.Parallel()
	authority := catest.New(t)
	one, stopOne := replica(t, authority, "one.example")
	two, stopTwo := replica(t, authority, "two.example")
	wrong, _ := replica(t, authority, "other.example")
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	at := map[string]string{"one.example:1": one, "two.example:1": two, "wrong.example:1": wrong, "mute.example:1": mute.Addr().String(), "dead.example:1": "127.0.0.1:1"}
	dial := func(ctx context.Context, address string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", at[address])
	}
	list, err := servers.Parse("dead.example:1,mute.example:1,wrong.example:1,one.example:1,two.example:1")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ask := func() error {
		conn, err := list.Client(dial, grpc.WithTransportCredentials(credentials.NewTLS(authority.ClientTLS())))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{}, grpc.WaitForReady(true))
		return err
	}
	for range 5 { // it begins somewhere else each time
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
	stopOne()
	if err := ask(); err != nil {
		t.Errorf("one replica died: %v", err)
	}
	stopTwo()
	list = servers.List{"dead.example:1", "wrong.example:1"}
	conn, err := list.Client(dial, grpc.WithTransportCredentials(credentials.NewTLS(authority.ClientTLS())))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{})
	if err == nil || !strings.Contains(err.Error(), "wrong.example") && !strings.Contains(err.Error(), "refused") {
		t.Errorf("a server of another name: %v", err)
	}
}
