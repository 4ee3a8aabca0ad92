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

	fieldDeltaRequestSubscribe   = 3 // DeltaDiscoveryRequest.resource_names_subscribe
	fieldDeltaRequestUnsubscribe = 4 // DeltaDiscoveryRequest.resource_names_unsubscribe
	fieldDeltaRequestInitial     = 5 // DeltaDiscoveryRequest.initial_resource_versions
	fieldDeltaResponseResources  = 2 // DeltaDiscoveryResponse.resources
	fieldDeltaResponseNonce      = 5 // DeltaDiscoveryResponse.nonce
	fieldDeltaResponseRemoved    = 6 // DeltaDiscoveryResponse.removed_resources
	fieldResourceName            = 3 // Resource.name
)

// text returns the last value of a length-delimited field of an encoded
// message, nil if it is absent. It reads past everything else without
// decoding it.
func text(data []byte, field protowire.Number) ([]byte, error) {
	var found []byte
	err := each(data, field, func(value []byte) error {
		if found = value; found == nil {
			found = []byte{}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// each shows every value of a length-delimited field of an encoded message, in order.
func each(data []byte, field protowire.Number, show func(value []byte) error) error {
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fmt.Errorf("%w: %w", errMalformed, protowire.ParseError(n))
		}
		data = data[n:]
		if number == field && kind == protowire.BytesType {
			value, n := protowire.ConsumeBytes(data)
			if n < 0 {
				return fmt.Errorf("%w: field %d: %w", errMalformed, number, protowire.ParseError(n))
			}
			data = data[n:]
			if err := show(value); err != nil {
				return err
			}
			continue
		}
		n = protowire.ConsumeFieldValue(number, kind, data)
		if n < 0 {
			return fmt.Errorf("%w: field %d: %w", errMalformed, number, protowire.ParseError(n))
		}
		data = data[n:]
	}
	return nil
}
