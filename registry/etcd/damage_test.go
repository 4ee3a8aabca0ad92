// SPDX-License-Identifier: Apache-2.0

package etcd_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

// prepared is a store with a member that reports two services.
func prepared(t *testing.T) (*etcd.Store, *clientv3.Client, registry.Session, *registry.Level) {
	t.Helper()
	db := openDatabase(t, t.TempDir())
	store := newStore(t, etcd.StoreConfig{Client: db.Client(), Sole: true})
	m := registrytest.Member(t, "uid-1", "east")
	if _, err := store.Join(t.Context(), m, registrytest.Token("t"), false); err != nil {
		t.Fatal(err)
	}
	session := begin(t, store, m.Source())
	level := &registry.Level{Records: registrytest.Records(
		registrytest.Record(m.Source(), "shop", "cart", 3), registrytest.Record(m.Source(), "shop", "web", 3))}
	if _, err := session.Apply(t.Context(), level); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, store, "both are seen", func(s *federation.Snapshot) bool { return len(s.Records) == 2 })
	return store, db.Client(), session, level
}

func put(t *testing.T, client *clientv3.Client, key, value string) {
	t.Helper()
	if _, err := client.Put(t.Context(), "/isthmus/"+key, value); err != nil {
		t.Fatal(err)
	}
}

func TestCorruptValuesAreQuarantined(t *testing.T) {
	t.Parallel()
	store, client, session, level := prepared(t)
	corrupt := map[string]string{
		"records/kube:uid-1/shop/cart":      "not JSON",
		"records/kube:uid-1/shop/cart/1-0":  `{"v":1,"g":1,"e":[{"n":7}]}`,
		"records/kube:uid-1/shop/ghost/1-0": `{"v":9}`,
		"records/too/few":                   `{"v":1}`,
		"workloads/kube:uid-1/u%zz":         `{"v":1}`,
		"workloads/kube:uid-1/u":            `{"v":0}`,
		"gateways/n1/kube:uid-1/a":          `[]`,
		"config/kube:uid-1/K/ns/name":       `{"v":1,"raw":`,
		"clusters/uid-2":                    "",
		"clusters/uid-1/conditions":         "?",
		"addresses/by-host/a.b":             `{"v":1,"v4":"nowhere"}`,
		"vms/n1/web":                        `{"v":1,"ports":"all"}`,
		"vms/n1/web/health":                 `0`,
		"sessions/kube:uid-9":               `"x"`,
		"clusters/uid-1/something-else":     `{"v":1}`,
	}
	for k, v := range corrupt {
		put(t, client, k, v)
	}
	var names []string
	for deadline := time.Now().Add(registrytest.Patience); len(names) != len(corrupt); {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d are quarantined: %v", len(names), len(corrupt), names)
		}
		names = names[:0]
		for _, q := range store.Health().Quarantined {
			if names = append(names, q.Key); q.Reason == "" {
				t.Errorf("%s has no reason", q.Key)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	s, _ := store.Snapshot()
	if len(s.Records) != 2 || len(s.Records[federation.ServiceName{Namespace: "shop", Name: "cart"}][0].Endpoints) != 3 {
		t.Errorf("what was there before a corrupt value is not served any more: %+v", s.Records)
	}
	// Who starts now has never seen the good values.
	other := newStore(t, etcd.StoreConfig{Client: client})
	if s, _ := other.Snapshot(); len(s.Records) != 1 || len(s.Clusters) != 1 {
		t.Errorf("one service can be read, and the cluster: got %+v", s)
	}
	// The next session writes what its source says over what is corrupt.
	session.Close(t.Context())
	session = begin(t, other, "kube:uid-1")
	level.Workloads = map[string]*federation.Workload{}
	if _, err := session.Apply(t.Context(), level); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, other, "the source has mended its records", func(s *federation.Snapshot) bool {
		left := slices.ContainsFunc(other.Health().Quarantined, func(q registry.Quarantined) bool {
			return strings.HasPrefix(q.Key, "records/kube:uid-1/") || q.Key == "workloads/kube:uid-1/u"
		})
		return len(s.Records) == 2 && !left
	})
}

func TestNewerSchemaMakesReadOnly(t *testing.T) {
	t.Parallel()
	store, client, _, _ := prepared(t)
	put(t, client, "records/kube:uid-1/shop/new", `{"v":2,"generation":1}`)
	until(t, "the record is quarantined", func() bool { return len(store.Health().Quarantined) == 1 })
	if reason := store.Health().ReadOnly; reason != "" {
		t.Errorf("a newer record makes the store read-only: %s", reason)
	}
	put(t, client, "clusters/uid-3", `{"v":2,"id":"uid-3","name":"new","network":"n9","role":"remote","apiServer":"https://x","novelty":true}`)
	s := registrytest.Eventually(t, store, "the newer cluster is known as far as it is understood", func(s *federation.Snapshot) bool { return s.Clusters["uid-3"] != nil })
	if s.Clusters["uid-3"].Network != "n9" {
		t.Errorf("cluster: %+v", s.Clusters["uid-3"])
	}
	if reason := store.Health().ReadOnly; !strings.Contains(reason, "clusters/uid-3") || !strings.Contains(reason, "newer schema") {
		t.Errorf("reason %q does not say why", reason)
	}
	if err := store.Leave(t.Context(), "uid-1"); !errors.Is(err, registry.ErrReadOnly) {
		t.Errorf("leave: got %v, want ErrReadOnly", err)
	}
	if _, err := client.Delete(t.Context(), "/isthmus/clusters/uid-3"); err != nil {
		t.Fatal(err)
	}
	registrytest.Eventually(t, store, "it can be written again", func(*federation.Snapshot) bool { return store.Health().ReadOnly == "" })
}

func TestUnknownFieldsSurviveARewrite(t *testing.T) {
	t.Parallel()
	store, client, _, _ := prepared(t)
	value := func(k string) map[string]any {
		t.Helper()
		response, err := client.Get(t.Context(), "/isthmus/"+k)
		if err != nil || len(response.Kvs) != 1 {
			t.Fatalf("%s: %v", k, err)
		}
		var v map[string]any
		if err := json.Unmarshal(response.Kvs[0].Value, &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	write := func(k string, v map[string]any) {
		t.Helper()
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		put(t, client, k, string(data))
	}
	v := value("clusters/uid-1")
	v["novelty"] = map[string]any{"deep": []any{"x"}}
	v["grant"].(map[string]any)["alsoNew"] = "y"
	write("clusters/uid-1", v)
	if err := store.UpdateMember(t.Context(), "uid-1", func(m *registry.Member) error { m.Network = "n7"; return nil }); err != nil {
		t.Fatal(err)
	}
	v = value("clusters/uid-1")
	if fmt.Sprint(v["novelty"]) != "map[deep:[x]]" || fmt.Sprint(v["grant"]) != "map[alsoNew:y]" || v["network"] != "n7" {
		t.Errorf("cluster: %v", v)
	}
	address := federation.VirtualAddress{Host: "a.b.svc.cluster.local", V4: netip.MustParseAddr("240.240.0.5"), V6: netip.MustParseAddr("2001:2::5")}
	if err := store.PutAddresses(t.Context(), []federation.VirtualAddress{address}); err != nil {
		t.Fatal(err)
	}
	k := "addresses/by-host/" + address.Host
	v = value(k)
	v["novelty"] = 1.0
	write(k, v)
	address.Released = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := store.PutAddresses(t.Context(), []federation.VirtualAddress{address}); err != nil {
		t.Fatal(err)
	}
	if v = value(k); v["novelty"] != 1.0 || v["released"] != "2026-01-01T00:00:00Z" {
		t.Errorf("address: %v", v)
	}
}

func TestCredentialsAreSealedUnderTheirKey(t *testing.T) {
	t.Parallel()
	store, client, _, _ := prepared(t)
	if _, err := store.Join(t.Context(), registrytest.Member(t, "uid-2", "west"), registrytest.Token("other"), false); err != nil {
		t.Fatal(err)
	}
	response, err := client.Get(t.Context(), "/isthmus/clusters/uid-1/credentials")
	if err != nil {
		t.Fatal(err)
	}
	put(t, client, "clusters/uid-2/credentials", string(response.Kvs[0].Value))
	until(t, "the credentials of one cluster do not open as those of another", func() bool {
		_, err := store.Credentials(t.Context(), "uid-2")
		return err != nil
	})
}

func TestDatabaseIsLookedAfter(t *testing.T) {
	t.Parallel()
	const quota = 16 << 20
	db, err := etcd.Open(t.Context(), etcd.DatabaseConfig{DataDir: t.TempDir(), Unsynced: true, Quota: quota})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	store := newStore(t, etcd.StoreConfig{Client: db.Client(), Sole: true, Maintenance: 20 * time.Millisecond, DefragmentFrom: 1 << 20})
	until := func(what string, is func(h registry.Health) bool) {
		t.Helper()
		for deadline := time.Now().Add(registrytest.Patience); ; {
			h := store.Health()
			if is(h) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("still not true: %s: %+v", what, h)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	until("quota and size are known", func(h registry.Health) bool { return h.Quota == quota && h.Size > 0 })
	filling := strings.Repeat("x", 1<<20)
	for i := 0; !slices.Contains(store.Health().Alarms, "NOSPACE soon"); i++ {
		if _, err := db.Client().Put(t.Context(), fmt.Sprintf("/other/%d", i), filling); err != nil {
			t.Fatalf("writes fail before there is a warning: %v (%+v)", err, store.Health())
		}
		time.Sleep(50 * time.Millisecond)
	}
	full := store.Health().Size
	response, err := db.Client().Delete(t.Context(), "/other/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Client().Compact(t.Context(), response.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	until("the space is given back", func(h registry.Health) bool { return h.Size < full/4 && len(h.Alarms) == 0 })
}
