// SPDX-License-Identifier: Apache-2.0

//go:build race

package ca_test

const raceEnabled = true
