// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// Result tells what happened to a stream.
type Result struct {
	// Injected are the objects that were changed, Unchanged those that had the
	// same proxy already, as kind/name.
	Injected, Unchanged []string
	// Skipped are those that run pods and stay without a proxy, with the reason.
	Skipped map[string]string
}

// templates says where the pod template is, by kind.
var templates = map[string][]string{
	"Pod":                   {},
	"Deployment":            {"spec", "template"},
	"ReplicaSet":            {"spec", "template"},
	"StatefulSet":           {"spec", "template"},
	"DaemonSet":             {"spec", "template"},
	"ReplicationController": {"spec", "template"},
	"Job":                   {"spec", "template"},
	"CronJob":               {"spec", "jobTemplate", "spec", "template"},
}

// YAML copies a stream of manifests from in to out and injects all pod
// templates in it. Documents without one are copied byte by byte.
func YAML(in io.Reader, out io.Writer, o Options) (Result, error) {
	result := Result{Skipped: map[string]string{}}
	if err := o.complete(); err != nil {
		return result, err
	}
	data, err := io.ReadAll(in)
	if err != nil {
		return result, err
	}
	for i, document := range split(data) {
		changed, err := inject(document, o, &result)
		if err != nil {
			return result, fmt.Errorf("document %d: %w", i+1, err)
		}
		if _, err := out.Write(changed); err != nil {
			return result, err
		}
	}
	return result, nil
}

// split cuts a stream at its separators, which stay at the head of what
// follows them. A "---" inside of a block scalar is indented, so a line that
// begins with it is a separator.
func split(data []byte) [][]byte {
	var documents [][]byte
	start := 0
	for at := 0; at < len(data); {
		end := bytes.IndexByte(data[at:], '\n') + 1
		if end == 0 {
			end = len(data) - at
		}
		line := strings.TrimRight(string(data[at:at+end]), " \t\r\n")
		if (line == "---" || strings.HasPrefix(line, "--- ")) && at > start {
			documents = append(documents, data[start:at])
			start = at
		}
		at += end
	}
	return append(documents, data[start:])
}

// inject returns the document with its templates injected, or the very same
// bytes if there is nothing to do.
func inject(document []byte, o Options, result *Result) ([]byte, error) {
	var object map[string]any
	if err := yaml.Unmarshal(document, &object); err != nil {
		var scalar any
		if yaml.Unmarshal(document, &scalar) == nil {
			return document, nil // not an object: not ours to judge
		}
		return nil, err
	}
	changed, err := walk(object, o, result)
	if err != nil || !changed {
		return document, err
	}
	body, err := yaml.Marshal(object)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(document, []byte("---")) {
		body = append([]byte("---\n"), body...)
	}
	return body, nil
}

// walk injects one object, or each item of a list.
func walk(object map[string]any, o Options, result *Result) (bool, error) {
	kind, _ := object["kind"].(string)
	if strings.HasSuffix(kind, "List") {
		items, _ := object["items"].([]any)
		some := false
		for _, item := range items {
			if inner, ok := item.(map[string]any); ok {
				changed, err := walk(inner, o, result)
				if err != nil {
					return false, err
				}
				some = some || changed
			}
		}
		return some, nil
	}
	path, ok := templates[kind]
	if !ok {
		return false, nil
	}
	name := kind + "/" + objectName(object)
	template, ok := descend(object, path)
	if !ok {
		return false, fmt.Errorf("%w: %s has no %s", ErrTemplate, name, strings.Join(path, "."))
	}
	changed, skipped, err := injectTemplate(template, o)
	switch {
	case err != nil:
		return false, fmt.Errorf("%s: %w", name, err)
	case skipped != "":
		result.Skipped[name] = skipped
	case changed:
		result.Injected = append(result.Injected, name)
	default:
		result.Unchanged = append(result.Unchanged, name)
	}
	return changed, nil
}

func objectName(object map[string]any) string {
	metadata, _ := object["metadata"].(map[string]any)
	for _, key := range []string{"name", "generateName"} {
		if name, _ := metadata[key].(string); name != "" {
			return name
		}
	}
	return "(no name)"
}

func descend(object map[string]any, path []string) (map[string]any, bool) {
	for _, key := range path {
		inner, ok := object[key].(map[string]any)
		if !ok {
			return nil, false
		}
		object = inner
	}
	return object, true
}

// injectTemplate changes metadata and spec of a template (or of a Pod) in
// place. Fields that this version does not know survive.
func injectTemplate(template map[string]any, o Options) (changed bool, skipped string, err error) {
	var typed corev1.PodTemplateSpec
	if err := convert(map[string]any{"metadata": template["metadata"], "spec": template["spec"]}, &typed); err != nil {
		return false, "", fmt.Errorf("%w: %w", ErrTemplate, err)
	}
	if len(typed.Spec.Containers) == 0 {
		return false, "", fmt.Errorf("%w: it has no containers", ErrTemplate)
	}
	before := typed.DeepCopy()
	if skipped, err = Pod(&typed, o); err != nil || skipped != "" {
		return false, skipped, err
	}
	if reflect.DeepEqual(before, &typed) {
		return false, "", nil
	}
	var was, is map[string]any
	if err := errors.Join(convert(before, &was), convert(&typed, &is)); err != nil {
		return false, "", err
	}
	for _, key := range []string{"metadata", "spec"} {
		template[key] = overlay(template[key], was[key], is[key])
	}
	return true, "", nil
}

func convert(from, to any) error {
	data, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, to)
}

// overlay carries the difference between was and is over to original, which
// may hold more than was. Lists of things with names are matched by name.
func overlay(original, was, is any) any {
	if reflect.DeepEqual(was, is) {
		return original
	}
	switch is := is.(type) {
	case map[string]any:
		o, _ := original.(map[string]any)
		w, _ := was.(map[string]any)
		out := map[string]any{}
		for key, value := range o {
			if _, had := w[key]; had {
				if _, has := is[key]; !has {
					continue // removed
				}
			}
			out[key] = value
		}
		for key, value := range is {
			if reflect.DeepEqual(w[key], value) {
				continue
			}
			out[key] = overlay(o[key], w[key], value)
		}
		return out
	case []any:
		o, _ := original.([]any)
		w, _ := was.([]any)
		out := make([]any, 0, len(is))
		for _, value := range is {
			out = append(out, overlay(named(o, value), named(w, value), value))
		}
		return out
	}
	return is
}

// named finds the element of a list that has the same name, or is the same.
func named(list []any, like any) any {
	want, _ := like.(map[string]any)
	for _, element := range list {
		have, ok := element.(map[string]any)
		if ok && want["name"] != nil && have["name"] == want["name"] {
			return element
		}
	}
	return nil
}
