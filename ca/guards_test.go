// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// guard is a place in the code that keeps an attack out or a rule of the specification up, and the test that must
// notice when it is gone.
type guard struct {
	name string // as in the tables of attack classes and of SPIFFE's rules
	test string // -test.run
	file string // from ca/
	from string // occurs exactly once
	to   string // off is true where the guard is switched off
}

// guards are switched off one by one in a copy of the source that only the compiler sees. The program has no
// switch.
var guards = []guard{
	{"A01", "TestAttackA01", "attest/attest.go", "verified, err := a.cfg.Authority.Verify(e.Chain)\n\tif err != nil {", "verified, err := a.cfg.Authority.Verify(e.Chain)\n\tif err != nil && !off {"},
	{"A02", "TestAttackA02", "attest/kubernetes.go", `other != "" && other != cluster.ClusterID {`, `other != "" && other != cluster.ClusterID && !off {`},
	{"A03", "TestAttackA03IssuanceMatrix", "prepare.go", "return c.granted(s)\n}", "if off {\nreturn nil\n}\nreturn c.granted(s)\n}"},
	{"A03-reserved", "TestAttackA03IdentityOutsideGrant", "prepare.go", "if s.reserved() {\n\t\treturn fmt", "if s.reserved() && !off {\n\t\treturn fmt"},
	{"A04", "TestAttackA04", "caserver/server.go", `GetFields()["ImpersonatedIdentity"] != nil {`, `GetFields()["ImpersonatedIdentity"] != nil && !off {`},
	{"A05", "TestAttackA05", "prepare.go", "req.DNSNames, req.Addresses); err != nil {", "req.DNSNames, req.Addresses); err != nil && !off {"},
	{"A06", "TestAttackA06", "verify.go", "\tpaths, err := leaf.Verify(", "\tif off {\n\t\troots = between\n\t}\n\tpaths, err := leaf.Verify("},
	{"A08", "TestAttackA08", "etcd/tokens.go", "if !got.Succeeded {", "if !got.Succeeded && !off {"},
	{"A09", "TestAttackA09", "etcd/tokens.go", "given[:], hash) != 1 {", "given[:], hash) != 1 && !off {"},
	{"A09-expiry", "TestAttackA09", "etcd/tokens.go", "if !t.clock().Before(what.Expires) {", "if !t.clock().Before(what.Expires) && !off {"},
	{"A10", "TestAttackA10", "attest/replay.go", "if have.thumbprint != thumbprint {", "if have.thumbprint != thumbprint && !off {"},
	{"A11", "TestAttackA11", "attest/kubernetes.go", `	return fmt.Errorf("audience %.200q; want %s"`, "	if off {\n\t\treturn nil\n\t}\n" + `	return fmt.Errorf("audience %.200q; want %s"`},
	{"A12", "TestAttackA12", "attest/kubernetes.go", "verified, err := jws.Verify(key.Key)", "verified, err := jws.Verify(key.Key)\n\t\t\tif off {\n\t\t\t\tverified, err = jws.UnsafePayloadWithoutVerification(), nil\n\t\t\t}"},
	{"A14", "TestAttackA14", "attest/kubernetes.go", "	if payload == nil {\n", "	if off && payload == nil {\n\t\treturn all[0], jws.UnsafePayloadWithoutVerification(), nil\n\t}\n	if payload == nil {\n"},
	{"A16", "TestAttackA16", "attest/attest.go", "Digest: hex.EncodeToString(sum[:]), Peer", "Digest: map[bool]string{false: hex.EncodeToString(sum[:]), true: string(bytes)}[off], Peer"},
	{"A21", "TestAttackA21", "caserver/server.go", "if p := recover(); p != nil {", "if p := recover(); p != nil {\n\t\t\tif off {\n\t\t\t\tpanic(p)\n\t\t\t}"},
	{"A22", "TestAttackA22Oversized", "csr.go", "if err := checkKey(req.PublicKey); err != nil {", "if err := checkKey(req.PublicKey); err != nil && !off {"},
	{"A22-bytes", "TestAttackA22OversizedRequest", "csr.go", "if len(text) > MaxCSR {", "if len(text) > MaxCSR && !off {"},
	{"A24", "TestAttackA24", "caserver/serving.go", "SessionTicketsDisabled: true,", "SessionTicketsDisabled: !off,"},
	{"A28", "TestAttackA28", "identity.go", "func (s Subject) Check() error {", "func (s Subject) Check() error {\n\tif off {\n\t\treturn nil\n\t}"},
	{"A32", "TestAttackA32", "revocation.go", "if !ok || !r.covers(notBefore) {", "if !ok || !r.covers(notBefore) || off {"},
	{"A34", "TestAttackA34", "record.go", "bodySeal(key, env.Body), env.Seal); err != nil {", "bodySeal(key, env.Body), env.Seal); err != nil && !off {"},
	{"A35", "TestAttackA35", "etcd/state.go", `"=", int64(version))}`, `map[bool]string{false: "=", true: ">"}[off], map[bool]int64{false: int64(version), true: -1}[off])}`},
	{"A35-fence", "TestAttackA35PausedLeader", "etcd/state.go", "	if term != nil {\n\t\tconditions", "	if term != nil && !off {\n\t\tconditions"},
	{"A36", "TestAttackA36Edited", "audit.go", "if digest(content) != hash {", "if digest(content) != hash && !off {"},
	{"A36-chain", "TestAttackA36Edited", "audit.go", "case entry.Previous != head.Hash:", "case entry.Previous != head.Hash && !off:"},
	{"A36-heads", "TestAttackA36Rewritten", "audit.go", "if at != mark.AuditHead {", "if at != mark.AuditHead && !off {"},
	{"A36-short", "TestAttackA36Rewritten", "audit.go", "if err == nil && len(marks) > 0 {", "if err == nil && len(marks) > 0 && !off {"},
	{"A36-kept", "TestAttackA36Rewritten", "checkpoint.go", "if err != nil || at != mark.AuditHead {", "if (err != nil || at != mark.AuditHead) && !off {"},
	{"A36-first", "TestAttackA36NoAudit", "sign.go", "	if err := a.cfg.Audit.Append(entry); err != nil {\n\t\treturn Issued{}, err", "	if err := a.cfg.Audit.Append(entry); err != nil && !off {\n\t\treturn Issued{}, err"},
	{"A38", "TestAttackA38", "sign.go", "0.1*jitter", "0.1*jitter*map[bool]float64{false: 1, true: 0}[off]"},
	{"A39", "TestAttackA39", "prepare.go", "from = now.Add(-c.Backdate)", "from = now.Add(-c.Backdate * map[bool]time.Duration{false: 1, true: 0}[off])"},
	{"A39-end", "TestAttackA39", "attest/kubernetes.go", "case now.After(c.Expiry.Time().Add(leeway)):", "case now.After(c.Expiry.Time().Add(leeway)) && !off:"},
	{"A39-agent", "TestAttackA39NotYet", "../agent/identity/keeper.go", "if present == nil || !present.ValidAt(k.clock()) {", "if off || present == nil || !present.ValidAt(k.clock()) {"},

	{"ID-4", "TestSpiffeID/ID-4", "identity.go", "	if len(name) > maxTrustDomain {", "	if len(name) > maxTrustDomain && !off {"},
	{"ID-5", "TestSpiffeID/ID-5", "identity.go", "	if len(s) > maxID {", "	if len(s) > maxID && !off {"},
	{"ID-8", "TestSpiffeID/ID-8", "identity.go", "func (s Subject) Check() error {", "func (s Subject) Check() error {\n\tif off {\n\t\treturn nil\n\t}"},
	{"X-9, ID-9", "TestSpiffeX509/X-9", "lint.go", "len(ids) != 1 || len(names) != 1 || ids[0]", "!off && (len(ids) != 1 || len(names) != 1) || !off && ids[0]"},
	{"X-1", "TestSpiffeX509/X-1:_two", "verify.go", "if len(ids) != 1 {", "if len(ids) != 1 && !off {"},
	{"X-2", "TestSpiffeX509/X-2", "verify.go", "	namespace, account, err := workloadOf(id)\n	if err != nil {", "	namespace, account, err := workloadOf(id)\n	if off {\n\t\tnamespace, account, err = \"shop\", \"reviews\", nil\n\t}\n	if err != nil {"},
	{"X-4", "TestSpiffeX509/X-4", "verify.go", "if !leaf.BasicConstraintsValid || leaf.IsCA {", "if off {\n\t} else if !leaf.BasicConstraintsValid || leaf.IsCA {"},
	{"X-5", "TestSpiffeX509/X-5", "verify.go", "	if !critical {", "	if !critical && !off {"},
	{"X-5-sign", "TestSpiffeX509/X-5", "verify.go", "(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {", "(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 && !off {"},
	{"X-6", "TestSpiffeX509/X-6", "verify.go", "!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {", "!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) && !off {"},
	{"X-7", "TestSpiffeX509/X-7", "verify.go", "if !leaf.BasicConstraintsValid || leaf.IsCA {", "if off {\n\t} else if !leaf.BasicConstraintsValid || leaf.IsCA {"},
	{"source", "TestSpiffeX509/source_of", "verify.go", "		if err = checkIssuer(td, path[1], identity.Source); err == nil {", "		if err = checkIssuer(td, path[1], identity.Source); err == nil || off {"},
	{"X-8", "TestSpiffeX509/X-8", "lint.go", "case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || !critical(oidKeyUsage):", "case !off && (cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || !critical(oidKeyUsage)):"},
	{"X-10", "TestSpiffeX509/X-10", "verify.go", "if !issuer.MaxPathLenZero || issuer.MaxPathLen != 0 {", "if (!issuer.MaxPathLenZero || issuer.MaxPathLen != 0) && !off {"},
	{"X-11", "TestSpiffeX509/X-11", "verify.go", "CurrentTime: now,", "CurrentTime: map[bool]time.Time{false: now, true: leaf.NotBefore.Add(time.Second)}[off],"},
	{"X-10-constraint", "TestSpiffeX509/intermediate_of_a_wider", "verify.go", "[]string{td.Name()}) || !issuer.PermittedDNSDomainsCritical {", "[]string{td.Name()}) && !off || !issuer.PermittedDNSDomainsCritical {"},
	// Two guards stand behind each other here, and both have to go.
	{"X-11-once", "TestVerifiedOnce", "verified.go", "!ok || now.Before(c.from) || now.After(c.to) ||", "!ok || !off && (now.Before(c.from) || now.After(c.to)) ||"},
	{"X-11-chain", "TestVerifiedOnce", "verified.go", "!slices.Equal(c.above, pointers(chain[1:]))", "!off && !slices.Equal(c.above, pointers(chain[1:]))"},
	{"X-12", "TestSpiffeX509/X-12", "verify.go", "if !id.MemberOf(td) {", "if !id.MemberOf(td) && !off {"},
	{"X-12", "TestSpiffeX509/X-12", "verify.go", "if !slices.Equal(issuer.PermittedURIDomains, ", "if !off && !slices.Equal(issuer.PermittedURIDomains, "},

	{"J-1", "TestSpiffeJWT/J-1", "jwtverify.go", "	header, payload, err := splitJWT(token)", "	if full, err := jose.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256}); off && err == nil {\n\t\ttoken, _ = full.CompactSerialize()\n\t}\n	header, payload, err := splitJWT(token)"},
	{"J-2", "TestSpiffeJWT/J-2", "jwtverify.go", "if !slices.Contains(jwtAlgorithms, algorithm) {", "if !slices.Contains(jwtAlgorithms, algorithm) && !off {"},
	// Here, too, the library stands behind the guard.
	{"J-2", "TestSpiffeJWT/J-2", "jwtverify.go", "	signed, err := jose.", "	if off && !slices.Contains(jwtAlgorithms, algorithm) {\n\t\treturn id, nil\n\t}\n	signed, err := jose."},
	{"J-3", "TestSpiffeJWT/J-3", "jwtverify.go", "		if to == nil {\n", "		if off && to == nil {\n\t\t\tcontinue\n\t\t}\n		if to == nil {\n"},
	{"J-3-type", "TestSpiffeJWT/J-3", "jwtverify.go", "present && kind != \"JWT\" &&", "present && !off && kind != \"JWT\" &&"},
	{"J-4-subject", "TestSpiffeJWT/J-4_subject", "jwtverify.go", "	if id.ID.Path() == \"\" {\n\t\treturn id, fmt", "	if id.ID.Path() == \"\" && !off {\n\t\treturn id, fmt"},
	{"J-4-audience", "TestSpiffeJWT/J-4_audience", "jwtverify.go", "case !slices.Contains(id.Audience, audience):", "case !slices.Contains(id.Audience, audience) && !off:"},
	{"J-4-end", "TestSpiffeJWT/J-4_end", "jwtverify.go", "case !now.Before(id.Expiry):", "case !now.Before(id.Expiry.Add(map[bool]time.Duration{true: time.Minute}[off])):"},
	{"J-4-begin", "TestSpiffeJWT/J-4_begin", "jwtverify.go", "if present && now.Add(jwtSkew).Before(at) {", "if present && now.Add(jwtSkew).Before(at) && !off {"},
	{"J-4-issue", "TestJWTRefused", "jwt.go", "if len(audience) == 0 || len(audience) > maxAudiences {", "if !off && (len(audience) == 0 || len(audience) > maxAudiences) {"},
	{"J-5", "TestSpiffeJWT/J-5", "jwtverify.go", "	if verified, err := signed.Verify(key); err != nil ||", "	if verified, err := signed.Verify(key); !off && err != nil || !off &&"},
	{"J-6", "TestJWTIssue", "jwt.go", "to: now.Add(j.cfg.Lifetime).Truncate", "to: now.Add(j.cfg.Lifetime * map[bool]time.Duration{false: 1, true: 12}[off]).Truncate"},
	{"J-7", "TestSpiffeJWTBundle/B-5", "jwtverify.go", "if head.Use != jwtUse ||", "if head.Use != jwtUse && !off ||"},
	{"J-header", "TestSpiffeJWT/twice", "jwtverify.go", "; twice {", "; twice && !off {"},
	{"J-size", "TestSpiffeJWT/too_long", "jwtverify.go", "if len(token) > maxJWT {", "if len(token) > maxJWT && !off {"},
	{"B-4", "TestSpiffeJWTBundle/B-4", "jwtverify.go", "err != nil || elements == nil {", "(err != nil || elements == nil) && !off {"},
	{"B-5", "TestSpiffeJWTBundle/B-5", "jwtverify.go", "		var key jose.JSONWebKey\n", "		var key jose.JSONWebKey\n\t\tif off && key.UnmarshalJSON(element) != nil {\n\t\t\treturn nil, errors.New(\"as strict as some libraries\")\n\t\t}\n"},
	{"JWT-grant", "TestJWTRefused", "jwt.go", "if err := j.a.cfg.granted(s); err != nil {", "if err := j.a.cfg.granted(s); err != nil && !off {"},
	{"JWT-revoked", "TestJWTRevokedSource", "jwtkeys.go", "if j.a.Revoked(source, \"\") != nil {", "if j.a.Revoked(source, \"\") != nil && !off {"},
	{"JWT-revoked-issue", "TestJWTRefused", "jwt.go", "revoked(s.Source, s.Instance, now); err != nil {", "revoked(s.Source, s.Instance, now); err != nil && !off {"},
	{"JWT-audit", "TestJWTRefused", "jwt.go", "	if err := j.a.cfg.Audit.Append(entry); err != nil {", "	if err := j.a.cfg.Audit.Append(entry); err != nil && !off {"},
	{"JWT-bearer", "TestJWTByCertificateAlone", "caserver/jwt.go", "if err == nil && evidence.Bearer != \"\" {", "if err == nil && evidence.Bearer != \"\" && !off {"},
	{"JWT-limit", "TestJWTLimit", "caserver/jwt.go", "if !s.tokens.allow(", "if !off && !s.tokens.allow("},
	{"JWT-lifetime", "TestJWTIssue", "jwt.go", "req.NotAfter.Before(plan.to) {", "req.NotAfter.Before(plan.to) && !off {"},

	{"W-2", "TestSpiffeWorkloadAPI/W-2", "workloadapi/caller.go", "values[0] != securityValue {", "values[0] != securityValue && !off {"},
	{"W-2-absent", "TestSpiffeWorkloadAPI/W-2", "workloadapi/caller.go", "len(values) != 1 ||", "len(values) != 1 && !(off && len(values) == 0) || len(values) > 0 &&"},
	{"W-4", "TestSpiffeWorkloadAPI/W-4", "workloadapi/server.go", "if errors.Is(err, ErrNoIdentity) {", "if errors.Is(err, ErrNoIdentity) && !off {"},
	{"W-7", "TestSpiffeWorkloadAPI/W-7", "workloadapi/server.go", "if err == nil && (svid.ID == \"\"", "if err == nil && !off && (svid.ID == \"\""},
	{"W-users", "TestUsers", "workloadapi/caller.go", "!slices.Contains(s.Users, caller.UID) {", "!slices.Contains(s.Users, caller.UID) && !off {"},
	{"W-9", "TestSpiffeWorkloadAPITokens/W-9", "jwtkeys.go", "KeyID: k.ID, Use: jwtUse}", "KeyID: k.ID, Use: map[bool]string{false: jwtUse, true: \"sig\"}[off]}"},
	{"W-10", "TestSpiffeWorkloadAPITokens/W-10", "workloadapi/jwt.go", "wish != svid.ID {", "wish != svid.ID && !off {"},
	{"W-10-audience", "TestSpiffeWorkloadAPITokens/W-10", "workloadapi/jwt.go", "if len(in.GetAudience()) == 0 || slices.Contains(in.GetAudience(), \"\") {", "if !off && (len(in.GetAudience()) == 0 || slices.Contains(in.GetAudience(), \"\")) {"},
	{"J-5-domain", "TestSpiffeWorkloadAPITokens/J-5", "workloadapi/jwt.go", "if td != own {", "if td != own && !off {"},
	{"W-limits", "TestLimits", "workloadapi/caller.go", "if *of(u) >= limit {", "if *of(u) >= limit && !off {"},
}

// guardRooms are the packages that have guards, and the tests that miss them.
var guardRooms = []string{".", "attest", "caserver", "etcd", "workloadapi", "../agent/identity"}

var offWord = regexp.MustCompile(`\boff\b`)

const guardSwitch = "ISTHMUS_TEST_GUARD_OFF"

// Every guard is missed by its test when it is gone, and all tests pass while all guards are there.
func TestGuardsAreMissed(t *testing.T) {
	if os.Getenv(guardSwitch) != "" {
		return // this is the copy
	}
	t.Parallel()
	overlay := guardOverlay(t)
	rooms := map[string]string{}
	for _, room := range guardRooms {
		rooms[room] = filepath.Join(t.TempDir(), "guards.test")
		args := []string{"test", "-c", "-overlay", overlay, "-o", rooms[room], "./" + room}
		if raceEnabled { // the packages below are those of this very run
			args = slices.Insert(args, 1, "-race")
		}
		if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 2)
	checked := map[string]bool{}
	for _, g := range guards {
		in := guardRoomsOf(t, g.test)
		try := func(off string, missed bool) {
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				var said []byte
				failed := false
				for _, room := range in {
					cmd := exec.Command(rooms[room], "-test.run", "^"+strings.ReplaceAll(g.test, "/", "/^"), "-test.v")
					cmd.Dir, cmd.Env = room, append(os.Environ(), guardSwitch+"="+off)
					out, err := cmd.CombinedOutput()
					said, failed = append(said, out...), failed || err != nil
				}
				if failed != missed || !strings.Contains(string(said), "=== RUN") {
					t.Errorf("%s without %s (in %s): failed %v, want %v\n%s", g.test, off, g.file, failed, missed, said)
				}
			})
		}
		if !checked[g.test] {
			checked[g.test] = true
			try("nothing", false)
		}
		try(g.name, true)
	}
	wg.Wait()
}

// guardRoomsOf are the rooms that have a test.
func guardRoomsOf(t *testing.T, test string) []string {
	t.Helper()
	name, _, _ := strings.Cut(test, "/")
	var out []string
	for _, room := range guardRooms {
		files, err := filepath.Glob(filepath.Join(room, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(files, func(path string) bool {
			text, err := os.ReadFile(path)
			return err == nil && strings.Contains(string(text), "\nfunc "+name)
		}) {
			out = append(out, room)
		}
	}
	if len(out) == 0 {
		t.Fatalf("no room has %s", test)
	}
	return out
}

// guardOverlay writes the copies, and the file that tells the compiler to take them.
func guardOverlay(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, g := range guards {
		if texts[g.file] == "" {
			text, err := os.ReadFile(g.file)
			if err != nil {
				t.Fatal(err)
			}
			texts[g.file] = string(text)
		}
		// Another guard may have been switched at the same place.
		if n := strings.Count(texts[g.file], g.from); n == 0 {
			t.Fatalf("%s: %q occurs %d times in %s; is the guard somewhere else now?", g.name, g.from, n, g.file)
		}
		to := offWord.ReplaceAllString(g.to, fmt.Sprintf("guardOff(%q)", g.name))
		texts[g.file] = strings.Replace(texts[g.file], g.from, to, 1)
	}
	out, copies := t.TempDir(), map[string]string{}
	put := func(name, text string) {
		path := filepath.Join(out, strings.ReplaceAll(name, string(filepath.Separator), "_"))
		write(t, path, text)
		copies[filepath.Join(dir, name)] = path
	}
	for name, text := range texts {
		put(name, text)
	}
	for _, room := range guardRooms {
		name := filepath.Base(filepath.Join(dir, room))
		put(filepath.Join(room, "guardoff.go"), "package "+name+"\n\nimport \"os\"\n\nfunc guardOff(name string) bool { return os.Getenv(\""+guardSwitch+"\") == name }\n")
	}
	text, err := json.Marshal(map[string]any{"Replace": copies})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(out, "overlay.json")
	write(t, path, string(text))
	return path
}
