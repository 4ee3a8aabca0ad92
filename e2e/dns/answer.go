// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// TTL of all records, in seconds: as short as cluster DNS usually has it.
const recordTTL = 5

// Sizes of UDP messages.
const (
	classicSize = 512  // without EDNS, RFC 1035 section 4.2.1
	largestSize = 1232 // with EDNS: what passes everywhere
	streamSize  = 1<<16 - 1
)

// maxAliases bounds how many aliases of its own zone an answer follows.
const maxAliases = 8

// question is what can be understood of a query.
type question struct {
	header dnsmessage.Header
	ask    dnsmessage.Question
	edns   bool
	size   int // what the asker takes by UDP
}

// errNoQuery says that a message is not even a query that could be refused.
var errNoQuery = errors.New("dns: message is no query")

// parseQuery reads a query. With errNoQuery nothing can be answered; with
// another error the header can be echoed.
func parseQuery(message []byte) (question, error) {
	q := question{size: classicSize}
	var parser dnsmessage.Parser
	var err error
	if q.header, err = parser.Start(message); err != nil || q.header.Response {
		return q, errNoQuery
	}
	questions, err := parser.AllQuestions()
	if err != nil {
		return q, fmt.Errorf("dns: questions: %w", err)
	}
	if len(questions) != 1 {
		return q, fmt.Errorf("dns: %d questions: want one", len(questions))
	}
	q.ask = questions[0]
	if err := errors.Join(parser.SkipAllAnswers(), parser.SkipAllAuthorities()); err != nil {
		return q, fmt.Errorf("dns: %w", err)
	}
	for {
		header, err := parser.AdditionalHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return q, nil
		}
		if err != nil {
			return q, fmt.Errorf("dns: additional records: %w", err)
		}
		if header.Type == dnsmessage.TypeOPT {
			q.edns = true
			q.size = min(max(int(header.Class), classicSize), largestSize)
		}
		if err := parser.SkipAdditional(); err != nil {
			return q, fmt.Errorf("dns: additional records: %w", err)
		}
	}
}

// Answer gives the reply to a query, nil if it deserves none. By UDP (stream
// false) it is cut to what the asker takes.
func (z *Zone) Answer(query []byte, stream bool) []byte {
	q, err := parseQuery(query)
	if errors.Is(err, errNoQuery) {
		return nil
	}
	reply := &reply{question: q, code: dnsmessage.RCodeFormatError}
	switch {
	case err != nil:
		reply.question.ask = dnsmessage.Question{}
	case q.header.OpCode != 0:
		reply.code = dnsmessage.RCodeNotImplemented
	case q.ask.Class != dnsmessage.ClassINET:
		reply.code = dnsmessage.RCodeRefused
	default:
		reply.code = z.fill(reply, q.ask)
	}
	limit := q.size
	if stream {
		limit = streamSize
	}
	packed, err := reply.pack(z, false)
	if err == nil && len(packed) <= limit {
		return packed
	}
	packed, err = reply.pack(z, true)
	if err != nil {
		return nil
	}
	return packed
}

// fill finds the records for a question, following aliases within the zone.
func (z *Zone) fill(r *reply, ask dnsmessage.Question) dnsmessage.RCode {
	owner := ask.Name
	for range maxAliases {
		entry, ok := z.Lookup(strings.TrimSuffix(owner.String(), "."))
		if !ok {
			if len(r.answers) > 0 {
				return dnsmessage.RCodeSuccess // an alias to a name of somebody else's
			}
			return dnsmessage.RCodeNameError
		}
		if entry.Alias == "" {
			r.addEntry(owner, ask.Type, entry)
			return dnsmessage.RCodeSuccess
		}
		target, err := dnsmessage.NewName(entry.Alias + ".")
		if err != nil {
			return dnsmessage.RCodeServerFailure
		}
		r.add(&r.answers, owner, dnsmessage.TypeCNAME, &dnsmessage.CNAMEResource{CNAME: target})
		if ask.Type == dnsmessage.TypeCNAME {
			return dnsmessage.RCodeSuccess
		}
		owner = target
	}
	return dnsmessage.RCodeServerFailure
}

// reply is a message in the making.
type reply struct {
	question question
	code     dnsmessage.RCode
	answers  []dnsmessage.Resource
	extra    []dnsmessage.Resource
}

func (r *reply) add(to *[]dnsmessage.Resource, owner dnsmessage.Name, kind dnsmessage.Type, body dnsmessage.ResourceBody) {
	*to = append(*to, dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: owner, Type: kind, Class: dnsmessage.ClassINET, TTL: recordTTL}, Body: body,
	})
}

// addEntry adds those records of an entry that were asked for.
func (r *reply) addEntry(owner dnsmessage.Name, kind dnsmessage.Type, entry Entry) {
	if kind != dnsmessage.TypeSRV {
		r.addAddrs(&r.answers, owner, kind, entry)
		return
	}
	for _, port := range entry.Ports {
		target, err := dnsmessage.NewName(port.Target + ".")
		if err != nil {
			continue
		}
		r.add(&r.answers, owner, dnsmessage.TypeSRV, &dnsmessage.SRVResource{Weight: 10, Port: port.Number, Target: target})
		r.addAddrs(&r.extra, target, dnsmessage.TypeALL, Entry{Addrs: port.Addrs})
	}
}

// addAddrs adds the addresses of the family that kind asks for.
func (r *reply) addAddrs(to *[]dnsmessage.Resource, owner dnsmessage.Name, kind dnsmessage.Type, entry Entry) {
	for _, addr := range entry.Addrs {
		switch {
		case addr.Is4() && (kind == dnsmessage.TypeA || kind == dnsmessage.TypeALL):
			r.add(to, owner, dnsmessage.TypeA, &dnsmessage.AResource{A: addr.As4()})
		case addr.Is6() && (kind == dnsmessage.TypeAAAA || kind == dnsmessage.TypeALL):
			r.add(to, owner, dnsmessage.TypeAAAA, &dnsmessage.AAAAResource{AAAA: addr.As16()})
		}
	}
}

// pack writes the message; one that is cut has no records.
func (r *reply) pack(z *Zone, cut bool) ([]byte, error) {
	message := dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: r.question.header.ID, Response: true, OpCode: r.question.header.OpCode, Authoritative: true,
			Truncated: cut, RecursionDesired: r.question.header.RecursionDesired, RecursionAvailable: true, RCode: r.code,
		},
	}
	if r.question.ask.Name.Length > 0 {
		message.Questions = []dnsmessage.Question{r.question.ask}
	}
	if !cut {
		message.Answers, message.Additionals = r.answers, r.extra
		if len(r.answers) == 0 && (r.code == dnsmessage.RCodeSuccess || r.code == dnsmessage.RCodeNameError) {
			message.Authorities = z.authority()
		}
	}
	if r.question.edns {
		var header dnsmessage.ResourceHeader
		if err := header.SetEDNS0(largestSize, r.code, false); err != nil {
			return nil, err
		}
		message.Additionals = append(message.Additionals[:len(message.Additionals):len(message.Additionals)],
			dnsmessage.Resource{Header: header, Body: &dnsmessage.OPTResource{}})
	}
	return message.Pack()
}

// authority is the zone's SOA record, by which resolvers know how long a name stays missing.
func (z *Zone) authority() []dnsmessage.Resource {
	owner, err := dnsmessage.NewName(z.Domain + ".")
	server, err2 := dnsmessage.NewName("ns.dns." + z.Domain + ".")
	mailbox, err3 := dnsmessage.NewName("hostmaster." + z.Domain + ".")
	if errors.Join(err, err2, err3) != nil {
		return nil
	}
	var r reply
	r.add(&r.answers, owner, dnsmessage.TypeSOA, &dnsmessage.SOAResource{
		NS: server, MBox: mailbox, Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, MinTTL: recordTTL,
	})
	return r.answers
}
