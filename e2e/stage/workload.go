// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"fmt"
	"strconv"
	"strings"
	"text/template"
)

// Workload is an echo program under a Deployment or StatefulSet, with the Service before
// it: what most stories need. Anything else is applied as YAML of its own.
type Workload struct {
	Namespace, Name string
	Replicas        int // 0 means 1
	Account         string
	Ports           []WorkloadPort
	Headless        bool
	StatefulSet     bool
	Inject          bool
	Export          bool              // false: isthmus-mesh.io/export: "false"
	Gated           bool              // a readiness gate, which Stage.Gate opens and closes
	Labels          map[string]string // of the pods, besides app
	Command         []string          // of the program; empty means serve
	Args            []string          // further arguments
	Grace           int               // seconds before a kill; 0 means 5
	Address         string            // of its only pod; "" means a free one
	ClusterIP       string            // of its Service; "" means a free one
}

// WorkloadPort is a port of a workload's Service.
type WorkloadPort struct {
	Name   string // "http", "grpc-x", "" …; decides the protocol as in any cluster
	Port   uint16
	Target uint16 // where the program listens
	Serve  string // protocol the program speaks there
}

// targets are the ports on which the echo program listens, by what it speaks there.
var targets = map[string]uint16{
	"http": 8080, "http2": 8080, "h2c": 8080, "ws": 8080, "grpc": 8082, "tcp": 8083, "first": 8084, "tls": 8443,
}

// ParsePort reads "NAME:PORT[:SPEAKS]": name of the Service's port, its number, and what
// the program speaks there when the name does not say ("-:9000:first" has no name).
func ParsePort(s string) (WorkloadPort, error) {
	parts := strings.Split(s, ":")
	if len(parts) < 2 || len(parts) > 3 {
		return WorkloadPort{}, fmt.Errorf("port %q: want NAME:PORT or NAME:PORT:PROTOCOL", s)
	}
	number, err := strconv.ParseUint(parts[1], 10, 16)
	if err != nil {
		return WorkloadPort{}, fmt.Errorf("port %q: %w", s, err)
	}
	serve := strings.SplitN(parts[0], "-", 2)[0]
	if len(parts) == 3 {
		serve = parts[2]
	}
	target, ok := targets[serve]
	if !ok {
		return WorkloadPort{}, fmt.Errorf("port %q: the echo program does not speak %q", s, serve)
	}
	name := parts[0]
	if name == "-" {
		name = ""
	}
	return WorkloadPort{Name: name, Port: uint16(number), Target: target, Serve: serve}, nil
}

// Manifest is the workload's YAML, before injection.
func (w Workload) Manifest() (string, error) {
	if w.Replicas == 0 {
		w.Replicas = 1
	}
	if len(w.Command) == 0 {
		w.Command = []string{"serve"}
	}
	if w.Account == "" {
		w.Account = w.Name
	}
	if w.Grace == 0 {
		w.Grace = 5
	}
	var b strings.Builder
	err := manifest.Execute(&b, w)
	return b.String(), err
}

var manifest = template.Must(template.New("workload").Parse(`apiVersion: v1
kind: Namespace
metadata:
  name: {{.Namespace}}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{.Account}}
  namespace: {{.Namespace}}
---
{{if .Ports}}apiVersion: v1
kind: Service
metadata:
  name: {{.Name}}
  namespace: {{.Namespace}}
{{- if not .Export}}
  annotations:
    isthmus-mesh.io/export: "false"
{{- end}}
spec:
{{- if .Headless}}
  clusterIP: None
{{- else if .ClusterIP}}
  clusterIP: {{.ClusterIP}}
{{- end}}
  selector:
    app: {{.Name}}
  ports:
{{- range .Ports}}
  - port: {{.Port}}
    targetPort: {{.Target}}
    {{- if .Name}}
    name: {{.Name}}
    {{- end}}
{{- end}}
---
{{end}}apiVersion: apps/v1
kind: {{if .StatefulSet}}StatefulSet{{else}}Deployment{{end}}
metadata:
  name: {{.Name}}
  namespace: {{.Namespace}}
spec:
  replicas: {{.Replicas}}
  selector:
    matchLabels:
      app: {{.Name}}
{{- if .StatefulSet}}
  serviceName: {{.Name}}
  podManagementPolicy: Parallel
{{- end}}
  template:
    metadata:
      labels:
        app: {{.Name}}
{{- range $k, $v := .Labels}}
        {{$k}}: "{{$v}}"
{{- end}}
{{- if .Address}}
      annotations:
        e2e.isthmus-mesh.io/address: "{{.Address}}"
{{- end}}
    spec:
      serviceAccountName: {{.Account}}
      terminationGracePeriodSeconds: {{.Grace}}
{{- if .Gated}}
      readinessGates: [{conditionType: isthmus-mesh.io/gate}]
{{- end}}
      containers:
      - name: app
        image: isthmus/echo:dev
        args: [{{range $i, $a := .Command}}{{if $i}}, {{end}}"{{$a}}"{{end}}{{range .Args}}, "{{.}}"{{end}}]
        env:
        - name: POD
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: NAMESPACE
          valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
        - name: NODE
          valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
        readinessProbe:
          httpGet: {path: /ready, port: 8080}
          periodSeconds: 1
`))
