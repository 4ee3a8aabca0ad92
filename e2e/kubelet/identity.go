// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// defaultPath is the PATH of containers that set none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// capabilityNames in the order of their numbers, see capability.h.
var capabilityNames = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
	"SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
	"SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
	"MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
	"CHECKPOINT_RESTORE",
}

// defaultCapabilities are those that container engines leave to root.
var defaultCapabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
	"NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
}

// identity is as whom and with which rights a container's processes run.
type identity struct {
	UID          int      `json:"uid"`
	GID          int      `json:"gid"`
	Groups       []int    `json:"groups"`
	Capabilities []string `json:"capabilities"` // the bounding set, by name
	NoNewRights  bool     `json:"noNewRights"`
}

// identityOf derives the identity of a container from its own and its pod's security context.
func identityOf(pod *corev1.Pod, c *corev1.Container) (identity, error) {
	id := identity{Capabilities: slices.Clone(defaultCapabilities)}
	if p := pod.Spec.SecurityContext; p != nil {
		setID(&id.UID, p.RunAsUser)
		setID(&id.GID, p.RunAsGroup)
		for _, group := range p.SupplementalGroups {
			id.Groups = append(id.Groups, int(group))
		}
		if p.FSGroup != nil {
			id.Groups = append(id.Groups, int(*p.FSGroup))
		}
	}
	s := c.SecurityContext
	if s == nil {
		return id, mustNotBeRoot(pod, c, id)
	}
	setID(&id.UID, s.RunAsUser)
	setID(&id.GID, s.RunAsGroup)
	id.NoNewRights = s.AllowPrivilegeEscalation != nil && !*s.AllowPrivilegeEscalation
	if s.Privileged != nil && *s.Privileged {
		id.Capabilities = slices.Clone(capabilityNames)
		return id, mustNotBeRoot(pod, c, id)
	}
	if s.Capabilities == nil {
		return id, mustNotBeRoot(pod, c, id)
	}
	for _, name := range s.Capabilities.Drop {
		id.Capabilities = slices.DeleteFunc(id.Capabilities, func(have string) bool {
			return name == "ALL" || have == capabilityName(name)
		})
	}
	for _, name := range s.Capabilities.Add {
		if name == "ALL" {
			id.Capabilities = slices.Clone(capabilityNames)
			break
		}
		if !slices.Contains(capabilityNames, capabilityName(name)) {
			return id, fmt.Errorf("container %s: securityContext.capabilities.add: %q is no capability of Linux", c.Name, name)
		}
		id.Capabilities = append(id.Capabilities, capabilityName(name))
	}
	return id, mustNotBeRoot(pod, c, id)
}

// mustNotBeRoot enforces runAsNonRoot.
func mustNotBeRoot(pod *corev1.Pod, c *corev1.Container, id identity) error {
	var want *bool
	if pod.Spec.SecurityContext != nil {
		want = pod.Spec.SecurityContext.RunAsNonRoot
	}
	if c.SecurityContext != nil && c.SecurityContext.RunAsNonRoot != nil {
		want = c.SecurityContext.RunAsNonRoot
	}
	if want != nil && *want && id.UID == 0 {
		return fmt.Errorf("container %s: runAsNonRoot is set, and it would run as root: set runAsUser", c.Name)
	}
	return nil
}

func setID(to *int, from *int64) {
	if from != nil {
		*to = int(*from)
	}
}

func capabilityName(name corev1.Capability) string {
	return strings.TrimPrefix(strings.ToUpper(string(name)), "CAP_")
}

// assume gives the calling thread this identity; only execve or the end of the
// thread may follow.
func (id identity) assume() error {
	if err := id.limit(); err != nil {
		return err
	}
	groups := make([]int, len(id.Groups))
	copy(groups, id.Groups)
	if err := unix.Setgroups(groups); err != nil {
		return fmt.Errorf("groups %v: %w", id.Groups, err)
	}
	if err := unix.Setresgid(id.GID, id.GID, id.GID); err != nil {
		return fmt.Errorf("group %d: %w", id.GID, err)
	}
	if err := unix.Setresuid(id.UID, id.UID, id.UID); err != nil {
		return fmt.Errorf("user %d: %w", id.UID, err)
	}
	return nil
}

// limit lowers the bounding set of the calling thread, which what it executes inherits.
func (id identity) limit() error {
	for number, name := range capabilityNames {
		if slices.Contains(id.Capabilities, name) {
			continue
		}
		// EINVAL: a capability that this kernel does not know.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(number), 0, 0, 0); err != nil && err != unix.EINVAL {
			return fmt.Errorf("drop capability %s: %w", name, err)
		}
	}
	if !id.NoNewRights {
		return nil
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}
