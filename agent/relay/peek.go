// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// errMalformed means that a frame is not a protobuf message.
var errMalformed = errors.New("malformed discovery message")

// Field numbers of envoy.service.discovery.v3.
const (
	fieldRequestType       = 4 // DiscoveryRequest.type_url
	fieldRequestError      = 6 // DiscoveryRequest.error_detail
	fieldRequestNonce      = 5 // DiscoveryRequest.response_nonce
	fieldDeltaRequestType  = 2 // DeltaDiscoveryRequest.type_url
	fieldDeltaRequestNonce = 6 // DeltaDiscoveryRequest.response_nonce
	fieldDeltaRequestError = 7 // DeltaDiscoveryRequest.error_detail
	fieldResponseType      = 4 // type_url of both response messages
	fieldStatusMessage     = 2 // google.rpc.Status.message
)

// text returns the last value of a length-delimited field of an encoded
// message, nil if it is absent. It reads past everything else without
// decoding it.
func text(data []byte, field protowire.Number) ([]byte, error) {
	var found []byte
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return nil, fmt.Errorf("%w: %w", errMalformed, protowire.ParseError(n))
		}
		data = data[n:]
		if number == field && kind == protowire.BytesType {
			value, n := protowire.ConsumeBytes(data)
			if n < 0 {
				return nil, fmt.Errorf("%w: field %d: %w", errMalformed, number, protowire.ParseError(n))
			}
			found, data = value, data[n:]
			if found == nil {
				found = []byte{}
			}
			continue
		}
		n = protowire.ConsumeFieldValue(number, kind, data)
		if n < 0 {
			return nil, fmt.Errorf("%w: field %d: %w", errMalformed, number, protowire.ParseError(n))
		}
		data = data[n:]
	}
	return found, nil
}
