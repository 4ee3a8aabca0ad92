// SPDX-License-Identifier: Apache-2.0

// Package ca is the identity of the mesh: who may sign, what is signed, and who a certificate speaks for.
//
// An [Authority] holds one trust domain. It has one root, made at the first start, and below it one
// intermediate per source (a joined cluster, a network of virtual machines, meshd itself), made when the
// source first needs one. All of it lives in a [State] that replicas share, with private keys sealed by a
// [Sealer] whose key is kept elsewhere.
//
// Issuing takes two steps. Prepare looks at an attested [Subject] and a certificate request and decides
// everything: names, lifetime, usages, the issuer. It returns a [Prepared], which nobody outside can fill in
// or use twice. Sign signs that and nothing else:
//
//	prepared, err := authority.Prepare(ctx, ca.Request{
//		Subject:    subject,    // from the credential, see package attest
//		Credential: credential, // what ends up in the audit log
//		CSR:        csr,        // only its public key is used
//	})
//	if err != nil {
//		return err // already in the audit log
//	}
//	issued, err := authority.Sign(ctx, prepared)
//
// Names never come from the request for a certificate: a request that asks for an identity other than that of
// its credential is refused, and the refusal is recorded. Every issuance and every refusal is one line of the
// audit log ([AuditLog]); a log that cannot be written stops issuance.
//
// The other direction is Verify: the chain a peer presented becomes an [Identity], or an error. It applies the
// rules of the X.509-SVID specification that the common libraries leave out.
package ca
