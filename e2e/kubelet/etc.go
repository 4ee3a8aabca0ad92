// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// etcFiles are the files of /etc that belong to the pod.
var etcFiles = []string{"hosts", "resolv.conf", "hostname"}

// writeEtc makes the pod's own files of /etc.
func (w *worker) writeEtc(pod *corev1.Pod) error {
	content := map[string]string{
		"hosts":       hostsFile(pod, w.facts().PodIPs, w.k.ClusterDomain),
		"resolv.conf": resolvConf(pod, w.k.DNS, w.k.ClusterDomain),
		"hostname":    hostName(pod) + "\n",
	}
	dir := filepath.Join(w.dir, "etc")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range etcFiles {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content[name]), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// hostName is the pod's name unless it says otherwise, within the kernel's 63 characters.
func hostName(pod *corev1.Pod) string {
	name := pod.Name
	if pod.Spec.Hostname != "" {
		name = pod.Spec.Hostname
	}
	if len(name) > 63 {
		name = strings.TrimRight(name[:63], "-.")
	}
	return name
}

// hostsFile writes /etc/hosts as kubelets do.
func hostsFile(pod *corev1.Pod, addrs []netip.Addr, domain string) string {
	var out strings.Builder
	out.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, addr := range addrs {
		fmt.Fprintf(&out, "%s", addr)
		if pod.Spec.Subdomain != "" {
			fmt.Fprintf(&out, "\t%s.%s.%s.svc.%s", hostName(pod), pod.Spec.Subdomain, pod.Namespace, domain)
		}
		fmt.Fprintf(&out, "\t%s\n", hostName(pod))
	}
	for _, alias := range pod.Spec.HostAliases {
		fmt.Fprintf(&out, "%s\t%s\n", alias.IP, strings.Join(alias.Hostnames, "\t"))
	}
	return out.String()
}

// resolvConf writes /etc/resolv.conf by the pod's DNS policy. The bed is closed,
// so the policy Default, which means the node's own servers, has none.
func resolvConf(pod *corev1.Pod, servers []netip.Addr, domain string) string {
	var nameservers, search, options []string
	switch pod.Spec.DNSPolicy {
	case corev1.DNSNone, corev1.DNSDefault:
	default:
		for _, server := range servers {
			nameservers = append(nameservers, server.String())
		}
		search = []string{pod.Namespace + ".svc." + domain, "svc." + domain, domain}
		options = []string{"ndots:5"}
	}
	if own := pod.Spec.DNSConfig; own != nil {
		nameservers = append(nameservers, own.Nameservers...)
		search = append(search, own.Searches...)
		for _, option := range own.Options {
			text := option.Name
			if option.Value != nil {
				text += ":" + *option.Value
				options = dropOption(options, option.Name)
			}
			options = append(options, text)
		}
	}
	var out strings.Builder
	for _, server := range nameservers {
		fmt.Fprintf(&out, "nameserver %s\n", server)
	}
	if len(search) > 0 {
		fmt.Fprintf(&out, "search %s\n", strings.Join(search, " "))
	}
	if len(options) > 0 {
		fmt.Fprintf(&out, "options %s\n", strings.Join(options, " "))
	}
	return out.String()
}

// dropOption removes an earlier value of a resolver option.
func dropOption(options []string, name string) []string {
	var kept []string
	for _, option := range options {
		if !strings.HasPrefix(option, name+":") {
			kept = append(kept, option)
		}
	}
	return kept
}

// sysctlPath turns net.ipv4.x into net/ipv4/x.
func sysctlPath(name string) string { return strings.ReplaceAll(name, ".", "/") }
