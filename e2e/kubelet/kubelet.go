// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// Config says what a [Kubelet] runs and where. Client, Nodes, Network and Dir are required.
type Config struct {
	// Client reaches the cluster's API server with an administrator's rights, see [NewClient].
	Client kubernetes.Interface
	// Nodes of the cluster; all of them are played by this kubelet.
	Nodes []Node
	// Network gives pods their network namespaces.
	Network Network
	// Images maps image names to local programs.
	Images map[string]Image
	// Dir is an existing folder for the state of pods. It should not be below a
	// folder that containers must see, and may be a memory file system.
	Dir string
	// DNS are the cluster's name servers, for /etc/resolv.conf.
	DNS []netip.Addr
	// ClusterDomain is the DNS suffix; empty means cluster.local.
	ClusterDomain string
	// APIServer is where pods reach the API server (KUBERNETES_SERVICE_HOST and
	// _PORT); the zero value leaves these variables out.
	APIServer netip.AddrPort
	// Env are NAME=value for every container, below the container's own variables.
	Env []string
	// Backoff between restarts.
	Backoff Backoff
	// ProbeFrom is where HTTP, TCP and gRPC probes and hooks come from: a
	// namespace that routes to the pods, as the node does. Nil means the pod's own.
	ProbeFrom Namespace
	// Shim is a program that calls [Shim]; empty means the running one.
	Shim string
	// Log gets what the kubelet has to say; nil discards it.
	Log *slog.Logger
}

// Network gives pods their network.
type Network interface {
	// Attach makes a network namespace with the given addresses (one of each
	// family at most), lo up, and a default route. Closing it removes it.
	Attach(ctx context.Context, name string, addrs []netip.Addr) (Namespace, error)
}

// Namespace is a network namespace.
type Namespace interface {
	// Path is a file that setns(2) accepts.
	Path() string
	// Close removes the namespace.
	Close() error
}

// Kubelet plays the nodes of one cluster, see the package comment.
type Kubelet struct {
	Config
	nodes     []*node
	scheduler scheduler
	configs   cache.SharedIndexInformer
	secrets   cache.SharedIndexInformer
	ready     chan struct{}

	mu      sync.Mutex
	workers map[types.UID]*worker
	all     sync.WaitGroup
}

// New checks a configuration. Nothing happens before [Kubelet.Run].
func New(config Config) (*Kubelet, error) {
	if config.Client == nil || config.Network == nil || config.Dir == "" || len(config.Nodes) == 0 {
		return nil, errors.New("kubelet: Client, Network, Dir and at least one node are required")
	}
	config.Backoff = config.Backoff.withDefaults()
	config.ClusterDomain = firstOf(config.ClusterDomain, "cluster.local")
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Shim == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("kubelet: %w", err)
		}
		config.Shim = self
	}
	k := &Kubelet{Config: config, workers: map[types.UID]*worker{}, ready: make(chan struct{})}
	k.scheduler.k = k
	for _, spec := range config.Nodes {
		n, err := newNode(spec)
		if err != nil {
			return nil, fmt.Errorf("kubelet: %w", err)
		}
		k.nodes = append(k.nodes, n)
	}
	return k, nil
}

// Run registers the nodes and runs their pods until ctx ends. Then it kills
// all processes, removes all namespaces and files it made, and returns; the API
// objects stay as they are. An API server that is away stops no pod.
func (k *Kubelet) Run(ctx context.Context) error {
	defer k.all.Wait()
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := k.run(running); ctx.Err() == nil {
		return err
	}
	return nil
}

// run is Run but for the waiting at its end.
func (k *Kubelet) run(ctx context.Context) error {
	for _, n := range k.nodes {
		if err := k.serve(ctx, n); err != nil {
			return err
		}
	}
	for _, n := range k.nodes {
		if err := k.register(ctx, n); err != nil {
			return err
		}
	}
	factory := informers.NewSharedInformerFactory(k.Client, 0)
	k.configs = factory.Core().V1().ConfigMaps().Informer()
	k.secrets = factory.Core().V1().Secrets().Informer()
	pods := factory.Core().V1().Pods().Informer()
	for _, informer := range []cache.SharedIndexInformer{k.configs, k.secrets} {
		if _, err := informer.AddEventHandler(k.contentHandler()); err != nil {
			return err
		}
	}
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), k.configs.HasSynced, k.secrets.HasSynced) {
		return ctx.Err()
	}
	registration, err := pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(object any) { k.observe(ctx, object) },
		UpdateFunc: func(_, object any) { k.observe(ctx, object) },
		DeleteFunc: k.vanished,
	})
	if err != nil {
		return err
	}
	if cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
		close(k.ready)
	}
	<-ctx.Done()
	factory.Shutdown()
	return nil
}

// Ready is closed when the nodes are registered and all existing pods were seen.
func (k *Kubelet) Ready() <-chan struct{} { return k.ready }

// observe takes a new or changed pod.
func (k *Kubelet) observe(ctx context.Context, object any) {
	pod, ok := object.(*corev1.Pod)
	if !ok || ctx.Err() != nil {
		return
	}
	if pod.Spec.NodeName == "" {
		k.scheduler.observe(ctx, pod)
		return
	}
	n := k.nodeNamed(pod.Spec.NodeName)
	if n == nil {
		return
	}
	k.mu.Lock()
	w, known := k.workers[pod.UID]
	if !known {
		w = newWorker(k, n, pod)
		k.workers[pod.UID] = w
	}
	k.mu.Unlock()
	if known {
		w.update(pod)
		return
	}
	k.all.Go(func() {
		w.run(ctx)
		k.mu.Lock()
		defer k.mu.Unlock()
		if w.gone.Err() != nil {
			delete(k.workers, pod.UID)
		}
	})
}

// vanished takes a pod that is gone from the API.
func (k *Kubelet) vanished(object any) {
	if last, ok := object.(cache.DeletedFinalStateUnknown); ok {
		object = last.Obj
	}
	pod, ok := object.(*corev1.Pod)
	if !ok {
		return
	}
	k.scheduler.forget(pod.UID)
	k.mu.Lock()
	defer k.mu.Unlock()
	w, ok := k.workers[pod.UID]
	if !ok {
		return
	}
	w.vanish()
	select {
	case <-w.done:
		delete(k.workers, pod.UID)
	default:
	}
}

func (k *Kubelet) nodeNamed(name string) *node {
	for _, n := range k.nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// contentHandler wakes the pods of a namespace when one of its ConfigMaps or Secrets changes.
func (k *Kubelet) contentHandler() cache.ResourceEventHandler {
	wake := func(object any) {
		if last, ok := object.(cache.DeletedFinalStateUnknown); ok {
			object = last.Obj
		}
		if meta, ok := object.(metav1.Object); ok {
			k.refreshPods(meta.GetNamespace())
		}
	}
	return cache.ResourceEventHandlerFuncs{AddFunc: wake, UpdateFunc: func(_, object any) { wake(object) }, DeleteFunc: wake}
}

func (k *Kubelet) refreshPods(namespace string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, w := range k.workers {
		if w.newest().Namespace == namespace {
			poke(w.refresh)
		}
	}
}

// configMap implements objects: from the API, or, while that is away, from the cache.
func (k *Kubelet) configMap(ctx context.Context, namespace, name string) (*corev1.ConfigMap, error) {
	asked, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	object, err := k.Client.CoreV1().ConfigMaps(namespace).Get(asked, name, metav1.GetOptions{})
	if err == nil || apierrors.IsNotFound(err) {
		return object, err
	}
	if cached, ok, _ := k.configs.GetStore().GetByKey(namespace + "/" + name); ok {
		return cached.(*corev1.ConfigMap), nil
	}
	return nil, err
}

// secret implements objects: from the API, or, while that is away, from the cache.
func (k *Kubelet) secret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	asked, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	object, err := k.Client.CoreV1().Secrets(namespace).Get(asked, name, metav1.GetOptions{})
	if err == nil || apierrors.IsNotFound(err) {
		return object, err
	}
	if cached, ok, _ := k.secrets.GetStore().GetByKey(namespace + "/" + name); ok {
		return cached.(*corev1.Secret), nil
	}
	return nil, err
}

// issueToken asks the API server for a token.
func (k *Kubelet) issueToken(ctx context.Context, namespace, account string, request *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	asked, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return k.Client.CoreV1().ServiceAccounts(namespace).CreateToken(asked, account, request, metav1.CreateOptions{})
}
