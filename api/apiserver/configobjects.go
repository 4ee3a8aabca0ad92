// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
)

// ListConfig implements api.AdminServer.
func (s *Server) ListConfig(_ context.Context, req *api.ListConfigRequest) (*api.ConfigObjectList, error) {
	source := federation.SourceID("")
	if req.GetCluster() != "" {
		m, err := s.member(req.GetCluster())
		if err != nil {
			return nil, err
		}
		source = m.Source()
	}
	out := &api.ConfigObjectList{ApiVersion: api.Version, Kind: "ConfigObjectList"}
	for _, o := range s.configObjects() {
		if (req.GetKind() == "" || strings.EqualFold(o.GetObjectKind(), req.GetKind())) &&
			(req.GetNamespace() == "" || o.GetMetadata().GetNamespace() == req.GetNamespace()) &&
			(source == "" || o.GetSource() == string(source)) {
			out.Items = append(out.Items, o)
		}
	}
	return out, nil
}

// configObjects are all objects, by kind, namespace, name and cluster.
func (s *Server) configObjects() []*api.ConfigObject {
	snapshot, _ := s.cfg.Store.Snapshot()
	index := s.index(snapshot)
	out := make([]*api.ConfigObject, 0, len(snapshot.Objects))
	for _, o := range snapshot.Objects {
		one := &api.ConfigObject{
			GroupVersion: o.APIVersion, ObjectKind: o.Kind, Source: string(o.Source), Cluster: snapshot.SourceName(o.Source),
			Metadata: &api.Metadata{Name: o.Name, Namespace: o.Namespace, Created: stamp(o.Created)},
		}
		if st, ok := index.Status(o); ok {
			one.Status, one.Message, one.Notes = string(st.State), st.Message, st.Notes
		}
		out = append(out, one)
	}
	slices.SortStableFunc(out, func(a, b *api.ConfigObject) int {
		return cmp.Or(cmp.Compare(a.GetObjectKind(), b.GetObjectKind()),
			compareNames(a.GetMetadata().GetNamespace(), a.GetMetadata().GetName(), b.GetMetadata().GetNamespace(), b.GetMetadata().GetName()),
			cmp.Compare(a.GetCluster(), b.GetCluster()))
	})
	return out
}

// index is the configuration of a snapshot. It is computed once for each
// snapshot that is asked about, reusing what did not change.
func (s *Server) index(snapshot *federation.Snapshot) *config.Index {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.indexed != snapshot {
		s.configuration, s.indexed = config.NewFrom(s.configuration, snapshot), snapshot
	}
	return s.configuration
}
