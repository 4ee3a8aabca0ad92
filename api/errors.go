// SPDX-License-Identifier: Apache-2.0

package api

import (
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrorDomain is the domain of the ErrorInfo detail of every error that this
// API explains.
const ErrorDomain = "isthmus-mesh.io"

// Problem is an error of the admin API in the four parts in which people meet
// it: what failed is the caller's to say, why is the Message.
type Problem struct {
	Status  codes.Code
	Code    Code   // "" if the server gave none
	Message string // why, lower case, for people
	Try     string // what to do, a command where there is one
}

// Error makes p an error that gRPC carries to the client.
func (p Problem) Error() string { return p.Message }

// GRPCStatus makes p a status with an ErrorInfo detail.
func (p Problem) GRPCStatus() *status.Status {
	s := status.New(p.Status, p.Message)
	with, err := s.WithDetails(&errdetails.ErrorInfo{
		Reason: string(p.Code), Domain: ErrorDomain,
		Metadata: map[string]string{"try": p.Try},
	})
	if err != nil {
		return s
	}
	return with
}

// ProblemOf finds what err, as a client received it, says. A nil error is a
// Problem with status OK.
func ProblemOf(err error) Problem {
	s := status.Convert(err)
	p := Problem{Status: s.Code(), Message: s.Message()}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == ErrorDomain {
			p.Code = Code(info.GetReason())
			p.Try = info.GetMetadata()["try"]
		}
	}
	return p
}
