// SPDX-License-Identifier: Apache-2.0

// Package registry is how records and configuration get in and are kept.
//
//	Source ─ Level ─► Ingest ─ Session.Apply ─► Store ─► federation.Snapshot
//
// A Source reports everything it sees at once, a Level, as often as it likes. Ingest
// coalesces bursts, enforces the grant of the source and asks the Session, which is the
// right to write for that source, to store the difference. The Store hands out the next
// immutable snapshot. The Runner keeps one Ingest for every source that the store knows.
//
// Levels, not edges: an event only wakes a source, which re-reads what it has. What was
// missed once is put right by the next level. What a source could not read is unknown,
// and unknown is kept as it was; absence is never deletion.
package registry
