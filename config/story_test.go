// SPDX-License-Identifier: Apache-2.0

package config_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"sigs.k8s.io/yaml"
)

// story reads YAML documents as objects of two primaries, "one" and "two", and a remote,
// "far". A document that begins with "# from two" is of another source than "one"; later
// documents are younger.
func story(t testing.TB, text string) *federation.Snapshot {
	t.Helper()
	s := &federation.Snapshot{Clusters: map[federation.ClusterID]*federation.Cluster{}}
	for _, name := range []federation.ClusterID{"one", "two", "far"} {
		s.Clusters[name] = &federation.Cluster{ID: name, Name: string(name), Role: federation.Primary}
	}
	s.Clusters["far"].Role = federation.Remote
	for i, doc := range strings.Split(dedent(text), "\n---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		from := federation.ClusterID("one")
		if rest, ok := strings.CutPrefix(strings.TrimSpace(doc), "# from "); ok {
			from = federation.ClusterID(strings.Fields(rest)[0])
		}
		o := object(t, doc)
		o.Source = federation.KubeSource(from)
		o.Created = time.Unix(int64(1000+i), 0)
		s.Objects = append(s.Objects, o)
	}
	return s
}

// object reads one YAML document.
func object(t testing.TB, doc string) *federation.Object {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(doc))
	if err != nil {
		t.Fatalf("story: %v\n%s", err, doc)
	}
	var head struct {
		APIVersion, Kind string
		Metadata         struct{ Namespace, Name string }
	}
	if err := yaml.Unmarshal(raw, &head); err != nil {
		t.Fatal(err)
	}
	return &federation.Object{
		Source: federation.KubeSource("one"), APIVersion: head.APIVersion, Kind: head.Kind,
		Namespace: head.Metadata.Namespace, Name: head.Metadata.Name, Raw: raw,
	}
}

// dedent lets YAML stand indented in a table.
func dedent(text string) string {
	text = strings.Trim(text, "\n")
	indent := text[:len(text)-len(strings.TrimLeft(text, "\t"))]
	var out []string
	for _, l := range strings.Split(text, "\n") {
		out = append(out, strings.ReplaceAll(strings.TrimPrefix(l, indent), "\t", "  "))
	}
	return strings.Join(out, "\n")
}

// labels reads "app=cart,version=v1".
func labels(text string) map[string]string {
	out := map[string]string{}
	for _, part := range strings.Split(text, ",") {
		if k, v, ok := strings.Cut(part, "="); ok {
			out[k] = v
		}
	}
	return out
}

// service reads "shop/cart".
func service(text string) federation.ServiceName {
	ns, name, _ := strings.Cut(text, "/")
	return federation.ServiceName{Namespace: ns, Name: name}
}

// short writes an object as the stories' expectations do: "kind namespace/name".
func short(id string) string {
	name, _, _ := strings.Cut(id, " @ ")
	return name
}

func peer(namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {namespace: %s, name: %s}\nspec: %s\n", namespace, name, spec)
}

func rule(namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {namespace: %s, name: %s}\nspec: %s\n", namespace, name, spec)
}

func routes(namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {namespace: %s, name: %s}\nspec: %s\n", namespace, name, spec)
}

func sidecar(namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {namespace: %s, name: %s}\nspec: %s\n", namespace, name, spec)
}

func docs(list ...string) string { return strings.Join(list, "---\n") }
