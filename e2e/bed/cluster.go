// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Issuer is what all clusters of the bed say about themselves in the tokens of
// their service accounts, as clusters do that were made by the same tool. Only
// their keys differ.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// apiPort is the port of every cluster's API server.
const apiPort = 6443

// ClusterConfig says how a cluster is made.
type ClusterConfig struct {
	// Network is where the cluster's pods live. Several clusters may share
	// one. It must be set.
	Network *Network
	// Services is the range of ClusterIPs; zero means the network's.
	Services netip.Prefix
	// Issuer replaces the issuer of service account tokens.
	Issuer string
	// APIServerFlags are added to the API server's.
	APIServerFlags []string
	// SigningKeyOf is the cluster whose key signs service account tokens here
	// too, as happens where a control plane was copied; nil means a key of its own.
	SigningKeyOf *Cluster
}

// A Cluster is a Kubernetes control plane on a host of the transit network:
// etcd, kube-apiserver with RBAC, kube-controller-manager. Its nodes are the
// kubelet's business (e2e/kubelet). Services of type LoadBalancer get an
// address on the transit network.
type Cluster struct {
	// Etcd, APIServer and ControllerManager are the cluster's processes, to be
	// killed, paused, restarted. Their data outlives them.
	Etcd, APIServer, ControllerManager *Process

	name    string
	world   *World
	network *Network
	host    *Namespace
	config  ClusterConfig
	ca      *authority
	admin   pair
	client  kubernetes.Interface

	nodeFront netip.Addr // the router's address for the node ports
}

// Cluster makes a cluster and waits until pods can be created in it.
func (w *World) Cluster(name string, config ClusterConfig) (*Cluster, error) {
	if config.Network == nil {
		return nil, fmt.Errorf("cluster %s: Network is not set", name)
	}
	if !config.Services.IsValid() {
		config.Services = config.Network.services
	}
	if config.Issuer == "" {
		config.Issuer = Issuer
	}
	host, err := w.Host(name)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", name, err)
	}
	c := &Cluster{name: name, world: w, network: config.Network, host: host, config: config}
	for _, step := range []func() error{c.issue, c.connect, c.exposeNodes, c.start} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("cluster %s: %w", name, err)
		}
	}
	w.mu.Lock()
	w.clusters = append(w.clusters, c)
	w.mu.Unlock()
	w.OnClose(c.stop)
	if err := c.WaitReady(w.ctx); err != nil {
		return nil, err
	}
	if err := w.writeKubeconfig(); err != nil {
		return nil, err
	}
	w.Go(c.balanceServices)
	return c, nil
}

// issue makes the cluster's certificates and keys.
func (c *Cluster) issue() (err error) {
	if c.ca, err = newAuthority("kubernetes-" + c.name); err != nil {
		return err
	}
	first := c.config.Services.Masked().Addr().Next()
	serving, err := c.ca.issue("kube-apiserver", nil,
		[]string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", c.name},
		[]netip.Addr{c.Addr(), first, netip.AddrFrom4([4]byte{127, 0, 0, 1})})
	if err != nil {
		return err
	}
	if c.admin, err = c.ca.issue("kubernetes-admin", []string{"system:masters"}, nil, nil); err != nil {
		return err
	}
	manager, err := c.ca.issue("system:kube-controller-manager", nil, nil, nil)
	if err != nil {
		return err
	}
	private, public, err := c.signingKey()
	if err != nil {
		return err
	}
	managerConfig, err := kubeconfig([]entry{{c.name, c.URL(), c.ca.pem, manager}})
	if err != nil {
		return err
	}
	return writeFiles(c.dir(), map[string][]byte{
		"ca.crt": c.ca.pem, "server.crt": serving.certificate, "server.key": serving.key,
		"sa.key": private, "sa.pub": public, "manager.conf": managerConfig,
	})
}

func (c *Cluster) signingKey() (private, public []byte, err error) {
	other := c.config.SigningKeyOf
	if other == nil {
		return signingKey()
	}
	if private, err = os.ReadFile(other.SigningKeyFile()); err != nil {
		return nil, nil, err
	}
	public, err = os.ReadFile(filepath.Join(other.dir(), "sa.pub"))
	return private, public, err
}

// SigningKeyFile holds, in PEM, the RSA key that signs service account tokens.
func (c *Cluster) SigningKeyFile() string { return filepath.Join(c.dir(), "sa.key") }

// RotateSigningKey restarts the control plane with another key that signs service account
// tokens. The old ones go on being accepted and published.
func (c *Cluster) RotateSigningKey(ctx context.Context) error {
	before, err := os.ReadFile(filepath.Join(c.dir(), "sa.pub"))
	if err != nil {
		return err
	}
	private, public, err := signingKey()
	if err != nil {
		return err
	}
	if err := writeFiles(c.dir(), map[string][]byte{"sa.key": private, "sa.pub": append(public, before...)}); err != nil {
		return err
	}
	for _, p := range []*Process{c.APIServer, c.ControllerManager} {
		if err := errors.Join(p.Kill(), p.Start()); err != nil {
			return err
		}
	}
	return c.WaitReady(ctx)
}

// connect makes the client of the administrator.
func (c *Cluster) connect() (err error) {
	c.client, err = kubernetes.NewForConfig(c.Config())
	return err
}

// start starts the processes; they wait for each other by themselves.
func (c *Cluster) start() (err error) {
	dir := c.dir()
	file := func(name string) string { return filepath.Join(dir, name) }
	bin := c.world.binaries
	if c.Etcd, err = c.host.Start(Command{Path: bin.Etcd, Args: []string{
		"--name=" + c.name, "--data-dir=" + file("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=" + c.name + "=http://127.0.0.1:2380",
	}}); err != nil {
		return err
	}
	if c.APIServer, err = c.host.Start(Command{Path: bin.APIServer, Args: append([]string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address=0.0.0.0", "--advertise-address=" + c.Addr().String(), fmt.Sprintf("--secure-port=%d", apiPort),
		"--tls-cert-file=" + file("server.crt"), "--tls-private-key-file=" + file("server.key"), "--client-ca-file=" + file("ca.crt"),
		"--cert-dir=" + file("certs"), "--service-cluster-ip-range=" + c.config.Services.String(),
		"--service-account-issuer=" + c.config.Issuer, "--api-audiences=" + c.config.Issuer,
		"--service-account-key-file=" + file("sa.pub"), "--service-account-signing-key-file=" + file("sa.key"),
		"--authorization-mode=RBAC", "--allow-privileged=true", "--endpoint-reconciler-type=none",
		"--kubelet-preferred-address-types=InternalIP", "--profiling=false",
	}, c.config.APIServerFlags...)}); err != nil {
		return err
	}
	c.ControllerManager, err = c.host.Start(Command{Path: bin.ControllerManager, Args: []string{
		"--kubeconfig=" + file("manager.conf"), "--leader-elect=false", "--bind-address=127.0.0.1",
		"--controllers=*,-nodelifecycle,-nodeipam,-persistentvolume-binder,-attachdetach",
		"--service-account-private-key-file=" + file("sa.key"), "--root-ca-file=" + file("ca.crt"),
		"--use-service-account-credentials=true", "--kube-api-qps=200", "--kube-api-burst=400",
	}})
	return err
}

// stop ends the processes, those first that would complain about the others.
func (c *Cluster) stop() error {
	var errs []error
	for _, p := range []*Process{c.ControllerManager, c.APIServer, c.Etcd} {
		errs = append(errs, p.Kill())
	}
	return errors.Join(errs...)
}

// startTime is how long a cluster may take to start: four seconds if its programs are in
// memory, much longer if the disk they are read from is busy.
const startTime = 2 * time.Minute

// WaitReady waits until the API server is ready and the controller manager has
// made what a pod needs, for startTime at most.
func (c *Cluster) WaitReady(ctx context.Context) error {
	err := until(ctx, startTime, pollEvery, func() error {
		for _, p := range []*Process{c.Etcd, c.APIServer, c.ControllerManager} {
			if !p.Running() {
				return fmt.Errorf("%s has ended: %s", p.Name(), lastLines([]byte(p.Log())))
			}
		}
		if _, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err != nil {
			return err
		}
		_, err := c.client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("cluster %s is not ready: %w", c.name, err)
	}
	return nil
}

// Name returns the cluster's name, which is also its context in the kubeconfig.
func (c *Cluster) Name() string { return c.name }

// Network returns the network of the cluster's pods.
func (c *Cluster) Network() *Network { return c.network }

// Namespace returns the host of the control plane. The cluster's kubelet
// listens there as well, so that the API server reaches it.
func (c *Cluster) Namespace() *Namespace { return c.host }

// Addr returns the API server's address on the transit network, which is the
// InternalIP of the cluster's nodes too.
func (c *Cluster) Addr() netip.Addr { return c.host.Addr() }

// URL returns the API server's address as clients on the transit network, and
// pods, dial it.
func (c *Cluster) URL() string {
	return "https://" + netip.AddrPortFrom(c.Addr(), apiPort).String()
}

// CA returns the certificate, in PEM, that the API server's own certificate
// descends from.
func (c *Cluster) CA() []byte { return c.ca.pem }

// Config returns the administrator's way to the API server. It dials through
// the cluster's namespace, so it works in this process wherever that is. Each
// call returns a copy.
func (c *Cluster) Config() *rest.Config {
	return &rest.Config{
		Host: c.URL(),
		TLSClientConfig: rest.TLSClientConfig{
			CAData: c.ca.pem, CertData: c.admin.certificate, KeyData: c.admin.key,
		},
		Dial: c.host.Dial, QPS: 500, Burst: 1000,
	}
}

// Client returns the administrator's client.
func (c *Cluster) Client() kubernetes.Interface { return c.client }

// UID returns the UID of the namespace kube-system, which is the cluster's
// identity in the mesh.
func (c *Cluster) UID(ctx context.Context) (string, error) {
	namespace, err := c.client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("cluster %s: read its UID: %w", c.name, err)
	}
	return string(namespace.UID), nil
}

// Kubectl runs kubectl against the cluster as its administrator and returns
// what it printed.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) ([]byte, error) {
	return c.host.Run(ctx, Command{
		Path: c.world.binaries.Kubectl,
		Args: append([]string{"--kubeconfig=" + c.world.Kubeconfig(), "--context=" + c.name}, args...),
	})
}

// Apply creates or updates the objects of a YAML file's content.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	file, err := os.CreateTemp(c.world.Dir("tmp"), "apply-*.yaml")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	_, err = file.WriteString(manifests)
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	if _, err = c.Kubectl(ctx, "apply", "--server-side", "--force-conflicts", "-f", file.Name()); err != nil {
		return fmt.Errorf("apply to cluster %s: %w", c.name, err)
	}
	return nil
}

func (c *Cluster) at() *Namespace { return c.host }

// dir is where the cluster keeps its files.
func (c *Cluster) dir() string { return c.world.Dir("cluster-" + c.name) }
