// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// addressBatch is how many addresses are written in one transaction: three operations and
// as many comparisons each.
const addressBatch = 30

type ipValue struct {
	version
	Host string `json:"host"`
}

// PutAddresses implements registry.Addresses.
func (s *Store) PutAddresses(ctx context.Context, addresses []federation.VirtualAddress) error {
	var taken []error
	for chunk := range slices.Chunk(addresses, addressBatch) {
		var refused []error
		err := s.decide(ctx, func(t *transaction) error {
			var err error
			refused, err = s.putAddresses(t, chunk)
			return err
		})
		if err != nil {
			return err
		}
		taken = append(taken, refused...)
	}
	return errors.Join(taken...)
}

func ips(a *federation.VirtualAddress) []netip.Addr {
	var out []netip.Addr
	for _, ip := range []netip.Addr{a.V4, a.V6} {
		if ip.IsValid() {
			out = append(out, ip)
		}
	}
	return out
}

func (s *Store) putAddresses(t *transaction, addresses []federation.VirtualAddress) (taken []error, err error) {
	var keys []string
	for i := range addresses {
		keys = append(keys, hostKey(addresses[i].Host))
		for _, ip := range ips(&addresses[i]) {
			keys = append(keys, ipKey(ip.String()))
		}
	}
	if err := t.get(keys...); err != nil {
		return nil, err
	}
	given := map[string]bool{} // keys that an earlier address of this batch takes
	for i := range addresses {
		a := &addresses[i]
		if err := s.putAddress(t, a, given); errors.Is(err, registry.ErrAddressTaken) {
			taken = append(taken, err)
		} else if err != nil {
			return nil, err
		}
	}
	return taken, nil
}

func (s *Store) putAddress(t *transaction, a *federation.VirtualAddress, given map[string]bool) error {
	k := hostKey(a.Host)
	raw := t.seen[k].value
	if raw != nil {
		var old addressValue
		if err := decode(raw, &old, &old.version); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
		if old.V4 != a.V4 || old.V6 != a.V6 {
			return fmt.Errorf("host %s has %s and %s: %w", a.Host, old.V4, old.V6, registry.ErrAddressTaken)
		}
		if old.Released.Equal(a.Released) {
			return nil
		}
	} else {
		for _, ip := range ips(a) {
			if ik := ipKey(ip.String()); t.seen[ik].value != nil || given[ik] {
				return fmt.Errorf("address %s for host %s: %w", ip, a.Host, registry.ErrAddressTaken)
			}
		}
	}
	if given[k] {
		return fmt.Errorf("host %s is given twice: %w", a.Host, registry.ErrAddressTaken)
	}
	given[k] = true
	value, err := overlay(raw, &addressValue{version{schema}, *a})
	if err != nil {
		return err
	}
	t.put(k, value)
	if raw != nil {
		return nil
	}
	for _, ip := range ips(a) {
		value, err := encode(&ipValue{version{schema}, a.Host})
		if err != nil {
			return err
		}
		given[ipKey(ip.String())] = true
		t.put(ipKey(ip.String()), value)
	}
	return nil
}

// DropAddresses implements registry.Addresses.
func (s *Store) DropAddresses(ctx context.Context, hosts []string, now time.Time) error {
	var early []error
	for chunk := range slices.Chunk(hosts, addressBatch) {
		var refused []error
		err := s.decide(ctx, func(t *transaction) error {
			var err error
			refused, err = s.dropAddresses(t, chunk, now)
			return err
		})
		if err != nil {
			return err
		}
		early = append(early, refused...)
	}
	return errors.Join(early...)
}

func (s *Store) dropAddresses(t *transaction, hosts []string, now time.Time) (early []error, err error) {
	for _, host := range hosts {
		k := hostKey(host)
		if err := t.get(k); err != nil {
			return nil, err
		}
		raw := t.seen[k].value
		if raw == nil {
			continue
		}
		var old addressValue
		if err := decode(raw, &old, &old.version); err != nil {
			return nil, fmt.Errorf("%s: %w", k, err)
		}
		if old.Released.IsZero() || now.Sub(old.Released) < registry.AddressRest {
			early = append(early, fmt.Errorf("host %s: %w", host, registry.ErrTooEarly))
			continue
		}
		t.delete(k)
		for _, ip := range ips(&old.VirtualAddress) {
			t.delete(ipKey(ip.String()))
		}
	}
	return early, nil
}
