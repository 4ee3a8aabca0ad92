// SPDX-License-Identifier: Apache-2.0

package ca

import "errors"

// What a State reports.
var (
	// ErrNotFound: the state has no value under that key.
	ErrNotFound = errors.New("no such key")
	// ErrExists: Create found a value under that key.
	ErrExists = errors.New("key exists")
	// ErrChanged: Replace found another version than the one it was given.
	ErrChanged = errors.New("value changed meanwhile")
	// ErrFenced: ReplaceAs found that the term has ended: somebody else leads, or may.
	ErrFenced = errors.New("term has ended")
)

// Why something was refused. Every error of Prepare, Sign and Verify wraps one of these.
var (
	// ErrRequest: the certificate request is malformed, too large, or of a kind of key that is not accepted.
	ErrRequest = errors.New("certificate request not acceptable")
	// ErrForeignName: the certificate request asks for another identity than that of its credential.
	ErrForeignName = errors.New("certificate request asks for another identity")
	// ErrSubject: the attested identity cannot be expressed as a SPIFFE ID of this trust domain.
	ErrSubject = errors.New("subject not acceptable")
	// ErrNotGranted: the source may not host this identity.
	ErrNotGranted = errors.New("identity not granted to this source")
	// ErrRevoked: the source or the instance has been cut off.
	ErrRevoked = errors.New("revoked")
	// ErrUntrusted: the chain does not lead to a root of this trust domain, or breaks a rule on the way.
	ErrUntrusted = errors.New("certificate not trusted")
	// ErrUnavailable: the state has been away for too long, or is needed now and is away. Try again.
	ErrUnavailable = errors.New("authority not available")
	// ErrAudit: the audit log cannot be written, so nothing is issued. Try again.
	ErrAudit = errors.New("audit log not writable")
	// ErrJoinToken: the join token is malformed, unknown, expired or spent.
	ErrJoinToken = errors.New("join token not accepted")
	// ErrLint: the certificate that was made is not the one that was decided on, or breaks a rule of its profile.
	ErrLint = errors.New("certificate does not pass its own check")
	// ErrSpent: the Prepared was used before, is too old, or was never prepared.
	ErrSpent = errors.New("prepared certificate not usable")
)

// What is wrong with a stored value.
var (
	// ErrCorrupt: the value does not decode, or is not what an authority wrote under that key.
	ErrCorrupt = errors.New("value damaged")
	// ErrNewerSchema: the value was written by a newer release; this one must not change it.
	ErrNewerSchema = errors.New("value written by a newer release")
	// ErrSealed: the sealing key is missing or is not the one the value was sealed with.
	ErrSealed = errors.New("value cannot be unsealed")
)
