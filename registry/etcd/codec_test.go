// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"hash/maphash"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// TestSlicesKeepEveryField fails when a field is added to federation.Endpoint and not to
// the encoding.
func TestSlicesKeepEveryField(t *testing.T) {
	t.Parallel()
	full := federation.Endpoint{
		Workload: "w", UID: "u", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		TargetPorts: map[uint32]uint32{80: 8080}, Health: federation.Terminating, Network: "n", Hostname: "h", ServiceAccount: "s",
		Locality: federation.Locality{Region: "r", Zone: "z", Subzone: "s"}, Labels: map[string]string{"a": "b=c", "d": ""}, Mesh: true,
	}
	v := reflect.ValueOf(full)
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Fatalf("this test does not set %s", v.Type().Field(i).Name)
		}
	}
	want := []federation.Endpoint{full, {Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, Health: federation.Ready}, {Workload: "w2", Health: federation.NotReady}}
	data, err := encodeSlice(7, want)
	if err != nil {
		t.Fatal(err)
	}
	generation, got, err := decodeSlice(data, &registry.Interner{})
	if err != nil || generation != 7 {
		t.Fatalf("generation %d, %v", generation, err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
	for i := range want {
		for j := range want {
			if equalEndpoint(&want[i], &got[j]) != (i == j) {
				t.Errorf("endpoints %d and %d: equal is wrong", i, j)
			}
		}
	}
}

// TestEqualEndpointLooksAtEveryField fails when a field is added and not compared.
func TestEqualEndpointLooksAtEveryField(t *testing.T) {
	t.Parallel()
	for i := range reflect.TypeFor[federation.Endpoint]().NumField() {
		var a, b federation.Endpoint
		f := reflect.ValueOf(&b).Elem().Field(i)
		switch f.Kind() {
		case reflect.String:
			f.SetString("x")
		case reflect.Bool:
			f.SetBool(true)
		case reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 1, 1))
		case reflect.Map:
			m := reflect.MakeMap(f.Type())
			m.SetMapIndex(reflect.Zero(f.Type().Key()), reflect.Zero(f.Type().Elem()))
			f.Set(m)
		case reflect.Struct:
			f.Field(0).SetString("x")
		default:
			t.Fatalf("field of kind %v", f.Kind())
		}
		if equalEndpoint(&a, &b) {
			t.Errorf("%s is not compared", reflect.TypeFor[federation.Endpoint]().Field(i).Name)
		}
	}
}

func TestKeysAreEncoded(t *testing.T) {
	t.Parallel()
	for _, parted := range [][]string{{"kube:uid", "ns", "name"}, {"a/b", "c%d", ""}, {"%2F", "/", "x y"}} {
		k := key(recordsPrefix, parted...)
		got, err := parts(k, recordsPrefix, 3, 3)
		if err != nil || !reflect.DeepEqual(got, parted) {
			t.Errorf("%q: %q became %q, %v", k, parted, got, err)
		}
	}
}

func FuzzDecodeSlice(f *testing.F) {
	data, err := encodeSlice(1, []federation.Endpoint{{Workload: "w", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Health: federation.Ready,
		Labels: map[string]string{"a": "b"}, TargetPorts: map[uint32]uint32{1: 2}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"v":1,"e":[{"n":-1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		generation, endpoints, err := decodeSlice(data, &registry.Interner{})
		if err != nil {
			return
		}
		again, err := encodeSlice(generation, endpoints)
		if err != nil {
			t.Fatal(err)
		}
		_, twice, err := decodeSlice(again, &registry.Interner{})
		if err != nil || !equalEndpoints(endpoints, twice) {
			t.Errorf("%q: %v\n%+v\n%+v", data, err, endpoints, twice)
		}
	})
}

// FuzzReplica puts anything under any key: nothing may panic, and a snapshot must always
// come out.
func FuzzReplica(f *testing.F) {
	for _, k := range []string{"records/s/n/a", "records/s/n/a/1-0", "workloads/s/0", "gateways/n/s/g", "config/s/k/n/o", "clusters/u", "clusters/u/conditions",
		"clusters/u/credentials", "addresses/by-host/h", "vms/n/v", "vms/n/v/health", "vms/n/v/present", "sessions/s", "replicas/r", "records/%zz/a/b", ""} {
		f.Add(k, []byte(`{"v":1}`))
		f.Add(k, []byte(`{"v":2,"name":"x"}`))
	}
	f.Fuzz(func(t *testing.T, k string, value []byte) {
		r := newReplica(maphash.MakeSeed())
		r.put("records/s/n/a", []byte(`{"v":1,"generation":0}`), 1)
		r.put(k, value, 1)
		r.publish()
		r.baseline("s")
		r.remove(k)
		r.publish()
		if strings.HasPrefix(k, recordsPrefix) && len(r.quarantine) > 0 {
			t.Errorf("%q is quarantined and gone", k)
		}
	})
}

func FuzzOverlay(f *testing.F) {
	f.Add([]byte(`{"v":1,"grant":{"x":1},"y":[]}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, stored []byte) {
		out, err := overlay(stored, &memberValue{version: version{schema}, Member: registry.Member{Issuer: "i"}})
		if err != nil {
			return
		}
		var v memberValue
		if err := decode(out, &v, &v.version); err != nil || v.Issuer != "i" {
			t.Errorf("%q became %q: %v", stored, out, err)
		}
	})
}
