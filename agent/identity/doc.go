// SPDX-License-Identifier: Apache-2.0

// Package identity keeps one workload's certificate fresh.
//
// A Keeper makes a key, sends a request for it to an Issuer, and repeats that
// at a jittered moment around half of the certificate's life, for ever. Until
// a new certificate is in hand the old one stays: a certificate service that
// is away costs nothing before the certificate itself has expired.
//
//	keeper := &identity.Keeper{Issuer: issuer, Log: log}
//	go keeper.Run(ctx)
//	cert, err := keeper.Wait(ctx) // the first certificate
//
// The key is made here and leaves only towards the local Envoy. On machines
// that must survive a reboot without a token, a Store keeps it on disk.
package identity
