// SPDX-License-Identifier: Apache-2.0

// Package dns answers the workload's name queries: names of mesh services from
// the table that meshd sends, everything else by asking the resolvers that the
// workload would have asked.
//
// Only addresses are answered from the table. A name that is in it and has no
// address of the asked family gets an empty answer (NOERROR), never NXDOMAIN,
// which would hide its other addresses from resolvers that cache it.
//
// Names are found as a workload of the namespace writes them. In namespace shop
// with the table's reviews.shop.svc.cluster.local, all of these are the same:
// reviews, reviews.shop, reviews.shop.svc, reviews.shop.svc.cluster.local, and
// the last two with a search domain behind them, which is what a C library with
// ndots:5 asks first.
package dns
