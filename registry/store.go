// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Errors of stores. They are wrapped; use errors.Is.
var (
	// ErrHeld: another replica syncs this source.
	ErrHeld = errors.New("source is synced by another replica")

	// ErrFenced: the session ended, by time or because its source was removed. Nothing
	// was written.
	ErrFenced = errors.New("session is over")

	// ErrReadOnly: a newer version of meshd has written to this store.
	ErrReadOnly = errors.New("store is read-only")

	// ErrNotFound: there is no such cluster, VM or address.
	ErrNotFound = errors.New("not found")

	// ErrSameUID, ErrSameName and ErrSameKey refuse a cluster because another member
	// already has that UID, name, or service account signing key.
	ErrSameUID  = errors.New("another member has this UID")
	ErrSameName = errors.New("another member has this name")
	ErrSameKey  = errors.New("another member has this signing key")

	// ErrAddressTaken: a virtual address or its host exists already with another partner.
	ErrAddressTaken = errors.New("address is taken")

	// ErrTooEarly: an address was used less than 24 h ago.
	ErrTooEarly = errors.New("address was in use less than 24 h ago")

	// ErrConflict: somebody else changed the same value, again and again.
	ErrConflict = errors.New("changed by somebody else")
)

// Store keeps what sources report, and the members of the mesh.
//
// Reads are served from memory and never fail, also while the store behind is away.
// Writes wait for it until their context ends. All methods may be called concurrently.
type Store interface {
	// Snapshot is the newest state this replica knows, and a channel that is closed as
	// soon as there is a newer one (of anything below, members and VMs included). Before
	// the first load the snapshot is empty and its revision 0.
	Snapshot() (*federation.Snapshot, <-chan struct{})

	// Begin takes the right to write for a source; ErrHeld if another replica has it,
	// ErrNotFound if the source is that of no member.
	Begin(ctx context.Context, source federation.SourceID) (Session, error)

	// Expose shows what a source says now in the place of what is stored of it, in the
	// snapshots of this replica alone, for as long as it cannot be stored. Kinds that the
	// level does not know are shown as they are stored. A later level takes its place; no
	// part of it is ever changed. Virtual addresses are not given out of memory: a service
	// that is new waits for the store.
	Expose(source federation.SourceID, level *Level)

	// Conceal ends that as soon as this replica has read that revision of the store.
	Conceal(source federation.SourceID, after federation.Revision)

	// Settled is the revision at which the last session began that has stored a whole level
	// of the source, as far as this replica has read; 0 if none has.
	Settled(source federation.SourceID) federation.Revision

	// SyncedElsewhere tells that another replica has the session of a source and has stored
	// a whole level with it, as far as this replica has read.
	SyncedElsewhere(source federation.SourceID) bool

	// Health tells how the store itself is.
	Health() Health

	Members
	Addresses
	VMs
}

// Session is the exclusive right to write for one source. It ends when it is closed, when
// the store has not heard of this replica for some seconds, or when its source is removed;
// a write that comes too late is refused with ErrFenced.
type Session interface {
	// Apply stores the difference between the level and what is stored. Nothing is written
	// when there is none. After an error the level may have been stored in part; applying
	// it again, with this or a later session, is safe.
	Apply(ctx context.Context, level *Level) (Written, error)

	// SetConditions stores transitions of the source's conditions, of clusters only.
	SetConditions(ctx context.Context, conditions []federation.Condition) (Written, error)

	// Began is the revision that began the session.
	Began() federation.Revision

	// Lost is closed when the session is over.
	Lost() <-chan struct{}

	// Close gives the right back at once. It is safe to call it again.
	Close(ctx context.Context) error
}

// Written counts what an operation cost.
type Written struct {
	Transactions int
	Operations   int
	Bytes        int // of keys and values

	// Revision by which all that was asked for is stored; only Apply tells it.
	Revision federation.Revision
}

// Add sums up.
func (w *Written) Add(o Written) {
	w.Transactions += o.Transactions
	w.Operations += o.Operations
	w.Bytes += o.Bytes
	w.Revision = max(w.Revision, o.Revision)
}

// Members are the joined clusters.
type Members interface {
	// Members returns the joined clusters, from memory.
	Members() map[federation.ClusterID]*Member

	// Join makes a cluster a member or brings it up to date, and keeps its credentials
	// sealed. UID, name and signing keys are unique, which is decided in one transaction
	// (ErrSameName, ErrSameKey). With replace it takes the place of the member that has
	// its name, whose records go with it. The grant, role, and so on are those given; the
	// time of joining is kept.
	Join(ctx context.Context, m *Member, c Credentials, replace bool) (Outcome, error)

	// UpdateMember changes a member by a function, which may be called several times. ID
	// cannot be changed.
	UpdateMember(ctx context.Context, id federation.ClusterID, change func(*Member) error) error

	// Credentials returns the credentials of a member, unsealed.
	Credentials(ctx context.Context, id federation.ClusterID) (Credentials, error)

	// SetCredentials replaces the credentials of a member, for renewal.
	SetCredentials(ctx context.Context, id federation.ClusterID, c Credentials) error

	// Leave removes a member and everything it reported, at once, and fences who syncs it.
	Leave(ctx context.Context, id federation.ClusterID) error
}

// Outcome of Join and PutVM.
type Outcome string

// The outcomes.
const (
	Created   Outcome = "created"
	Updated   Outcome = "updated"
	Replaced  Outcome = "replaced"
	Unchanged Outcome = "unchanged"
)

// Addresses are the virtual addresses of hosts, which are in the Snapshot.
type Addresses interface {
	// PutAddresses creates addresses by compare-and-create, or changes when an existing one
	// was released. All or none of each address; the first ErrAddressTaken is returned
	// after all the others were tried.
	PutAddresses(ctx context.Context, addresses []federation.VirtualAddress) error

	// DropAddresses removes addresses that were released at least 24 h before now; the
	// others are refused with ErrTooEarly.
	DropAddresses(ctx context.Context, hosts []string, now time.Time) error
}

// AddressRest is how long an address stays valid after it was released, and is not given
// to another host.
const AddressRest = federation.AddressHold

// VMs are the registered workloads outside of Kubernetes.
type VMs interface {
	// VMs returns the registered VMs with their health, from memory.
	VMs() map[VMName]*VM

	// PutVM registers a VM or brings its registration up to date; Health is ignored.
	PutVM(ctx context.Context, vm *VM) (Outcome, error)

	// RemoveVM removes a registration; ErrNotFound if there is none.
	RemoveVM(ctx context.Context, name VMName) error

	// ReportVM stores what a VM reports about itself, if it differs from what is stored,
	// and keeps the VM present for as long as this replica lives or until LoseVM.
	ReportVM(ctx context.Context, name VMName, health VMHealth) (Written, error)

	// LoseVM ends the presence of a VM, unless another replica has it by now.
	LoseVM(ctx context.Context, name VMName) error
}

// Health tells how a store is.
type Health struct {
	// Degraded tells that the store behind cannot be written now; Since when, and why.
	Degraded bool
	Since    time.Time
	Reason   string

	// ReadOnly says why nothing is written at all; empty if it is.
	ReadOnly string

	// Quarantined are values that could not be understood, ordered by key. Everything
	// else works.
	Quarantined []Quarantined

	// Size of the database in bytes, how much of it is in use, and its quota (0 if unknown).
	Size, InUse, Quota int64

	// Alarms raised by the database, "NOSPACE" or "CORRUPT", and "NOSPACE soon" from 80 %.
	Alarms []string

	Revision federation.Revision
}

// Quarantined is a value that could not be understood.
type Quarantined struct {
	Key    string
	Reason string
}
