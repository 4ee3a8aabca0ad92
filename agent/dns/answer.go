// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// ttl of answers from the table, in seconds: addresses of the mesh are
	// stable, and a table changes without anybody being told.
	ttl = 30
	// smallest and largest UDP answers, in bytes. The latter is what fits a
	// common path without fragments being lost.
	smallest, largest = 512, 4096
)

// errQuery means that a packet is not a query that we can even refuse.
var errQuery = errors.New("not a DNS query")

// query is the part of a message that matters.
type query struct {
	header   dnsmessage.Header
	question dnsmessage.Question
	edns     bool
	size     int // what the client accepts over UDP
}

// parse decodes a query. Exactly one question is allowed, as everywhere.
func parse(packet []byte) (query, error) {
	var p dnsmessage.Parser
	header, err := p.Start(packet)
	if err != nil {
		return query{}, fmt.Errorf("%w: %w", errQuery, err)
	}
	if header.Response {
		return query{}, fmt.Errorf("%w: it is a response", errQuery)
	}
	q := query{header: header, size: smallest}
	questions, err := p.AllQuestions()
	if err != nil || len(questions) != 1 {
		return q, fmt.Errorf("%w: want one question", errQuery)
	}
	q.question = questions[0]
	if p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return q, nil
	}
	for {
		r, err := p.AdditionalHeader()
		if err != nil {
			return q, nil // the end, or an additional section nobody needs
		}
		if r.Type == dnsmessage.TypeOPT {
			q.edns = true
			q.size = min(max(int(r.Class), smallest), largest)
		}
		if p.SkipAdditional() != nil {
			return q, nil
		}
	}
}

// reply builds an answer of at most limit bytes; what does not fit is left out
// and marked as truncated, so that the client asks again over TCP.
func (q query) reply(code dnsmessage.RCode, addresses []netip.Addr, limit int) ([]byte, error) {
	for n := len(addresses); ; n /= 2 {
		out, err := q.build(code, addresses[:n], n < len(addresses))
		if err != nil {
			return nil, err
		}
		if len(out) <= limit || n == 0 {
			return out, nil
		}
	}
}

func (q query) build(code dnsmessage.RCode, addresses []netip.Addr, truncated bool) ([]byte, error) {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{
		ID:                 q.header.ID,
		Response:           true,
		OpCode:             q.header.OpCode,
		Authoritative:      code == dnsmessage.RCodeSuccess,
		Truncated:          truncated,
		RecursionDesired:   q.header.RecursionDesired,
		RecursionAvailable: true,
		RCode:              code,
	})
	b.EnableCompression()
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if q.question.Name.Length > 0 {
		if err := b.Question(q.question); err != nil {
			return nil, err
		}
	}
	if err := b.StartAnswers(); err != nil {
		return nil, err
	}
	for _, a := range addresses {
		if err := q.resource(&b, a); err != nil {
			return nil, err
		}
	}
	if q.edns {
		if err := q.opt(&b); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

func (q query) resource(b *dnsmessage.Builder, a netip.Addr) error {
	header := dnsmessage.ResourceHeader{Name: q.question.Name, Class: dnsmessage.ClassINET, TTL: ttl}
	if a.Is4() {
		return b.AResource(header, dnsmessage.AResource{A: a.As4()})
	}
	return b.AAAAResource(header, dnsmessage.AAAAResource{AAAA: a.As16()})
}

func (q query) opt(b *dnsmessage.Builder) error {
	if err := b.StartAdditionals(); err != nil {
		return err
	}
	var header dnsmessage.ResourceHeader
	if err := header.SetEDNS0(largest, dnsmessage.RCodeSuccess, false); err != nil {
		return err
	}
	return b.OPTResource(header, dnsmessage.OPTResource{})
}

// addresses returns what of an entry answers the question, in random order, so
// that clients who take the first spread over all.
func (q query) addresses(e entry) []netip.Addr {
	var found []netip.Addr
	switch q.question.Type {
	case dnsmessage.TypeA:
		found = append(found, e.four...)
	case dnsmessage.TypeAAAA:
		found = append(found, e.six...)
	case dnsmessage.TypeALL:
		found = append(append(found, e.four...), e.six...)
	}
	rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	return found
}
