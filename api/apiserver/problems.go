// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/registry"
)

// invalid is for a field that cannot be right.
func invalid(format string, args ...any) error {
	return api.Problem{Status: codes.InvalidArgument, Code: api.InvalidInput, Message: fmt.Sprintf(format, args...)}
}

// unknown is for a name that does not exist; the names that do are searched for
// one that may be meant.
func unknown(what, name string, names []string, list string) error {
	p := api.Problem{Status: codes.NotFound, Code: api.UnknownName, Message: fmt.Sprintf("there is no %s %q", what, name)}
	if near := near(name, names); len(near) > 0 {
		p.Try = "did you mean " + strings.Join(near, " or ") + "?"
	} else {
		p.Try = list + " lists all"
	}
	return p
}

// near returns at most three names that look like the given one.
func near(given string, names []string) []string {
	type candidate struct {
		name     string
		distance int
	}
	var all []candidate
	for _, n := range names {
		d := distance(strings.ToLower(given), strings.ToLower(n))
		if strings.HasPrefix(n, given) {
			d = 1
		}
		if d <= max(2, len(given)/3) {
			all = append(all, candidate{n, d})
		}
	}
	slices.SortFunc(all, func(a, b candidate) int {
		if a.distance != b.distance {
			return a.distance - b.distance
		}
		return strings.Compare(a.name, b.name)
	})
	var out []string
	for _, c := range all[:min(3, len(all))] {
		out = append(out, c.name)
	}
	return out
}

// distance is Levenshtein's, of bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// explain turns an error of the rooms below into one that a caller understands.
func explain(err error) error {
	var known api.Problem
	if err == nil || errors.As(err, &known) {
		return err
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	p := api.Problem{Status: codes.Internal, Message: err.Error()}
	switch {
	case errors.Is(err, context.Canceled):
		p.Status = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		p.Status, p.Code, p.Message = codes.Unavailable, api.StoreUnreadable, "the store did not answer in time: "+err.Error()
	case errors.Is(err, registry.ErrReadOnly), errors.Is(err, ca.ErrNewerSchema):
		p.Status, p.Code = codes.FailedPrecondition, api.StoreReadOnly
	case errors.Is(err, registry.ErrNotFound):
		p.Status, p.Code = codes.NotFound, api.UnknownName
	case errors.Is(err, registry.ErrSameUID):
		p.Status, p.Code = codes.AlreadyExists, api.DuplicateCluster
	case errors.Is(err, registry.ErrSameName):
		p.Status, p.Code = codes.AlreadyExists, api.DuplicateName
	case errors.Is(err, registry.ErrSameKey):
		p.Status, p.Code = codes.AlreadyExists, api.DuplicateKey
	case errors.Is(err, registry.ErrConflict), errors.Is(err, registry.ErrFenced):
		p.Status = codes.Aborted
	case errors.Is(err, ca.ErrUnavailable):
		p.Status, p.Code = codes.Unavailable, api.StoreUnreadable
	}
	return p
}
