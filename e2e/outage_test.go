// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
	"github.com/isthmus-mesh/isthmus/registry/kube"
)

// outageWords are about parts that are away, replaced or restored.
//
//	assignment CLUSTER NS/APP HOST     what the Envoy was told of a service's endpoints, every byte
//	restart-proxy CLUSTER NS/APP       its first pod's agent and Envoy are killed; until they are back
//	forbid, allow CLUSTER RESOURCE     what meshd's account may read of a kind in a member
//	follow NAME CLUSTER NS/APP         the logs of the pods that a workload has now
//	followed NAME                      waits until these pods have ended, and prints what they logged
//	front NAME                         a load balancer before all replicas that come after it
//	meanwhile DURATION                 an outage goes on for as long
//	etcd-state PREFIX                  the keys below /isthmus/PREFIX and the revisions that wrote them
//	portion APP MIN MAX CLUSTER NS/APP URL [n=N]   share of the answers that came from pods of APP
//	operate NAME ARG…                  meshd ARG… with the data directory of a replica, on its host
//	lose NAME                          a replica's data directory, but for the sealing key, which was kept
//	renew CLUSTER NS/APP               its first pod's agent renews its certificate
//	rotate-key CLUSTER                 its API server signs tokens with another key from now on
var outageWords = map[string]word{
	"assignment": wordAssignment, "restart-proxy": wordRestartProxy, "renew": wordRenew,
	"forbid": wordForbid, "allow": wordForbid, "follow": wordFollow, "followed": wordFollowed,
	"front": wordFront, "meanwhile": wordMeanwhile, "etcd-state": wordEtcdState, "portion": wordPortion, "operate": wordOperate, "lose": wordLose,
	"rotate-key": wordRotateKey,
}

// wordAssignment prints the load assignments of a host as Envoy holds them, in an order
// and form of their own, so that equal ones are equal text.
func wordAssignment(ctx context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	dump, err := s.Envoy(ctx, args[0], args[1], "/config_dump?include_eds&resource=dynamic_endpoint_configs")
	if err != nil {
		return err
	}
	s.out, err = assignments(dump, args[2])
	return err
}

// assignments picks those of a host out of an Envoy's dump.
func assignments(dump, host string) (string, error) {
	var parsed struct {
		Configs []struct {
			Endpoints struct {
				Name string `json:"cluster_name"`
			} `json:"endpoint_config"`
		} `json:"configs"`
	}
	var whole struct {
		Configs []struct {
			Endpoints any `json:"endpoint_config"`
		} `json:"configs"`
	}
	if err := errors.Join(json.Unmarshal([]byte(dump), &parsed), json.Unmarshal([]byte(dump), &whole)); err != nil {
		return "", err
	}
	found := map[string]any{}
	for i, c := range parsed.Configs {
		if name := c.Endpoints.Name; strings.Contains(name, "|"+host+".") {
			found[name] = whole.Configs[i].Endpoints
		}
	}
	if len(found) == 0 {
		return "", fmt.Errorf("Envoy holds no endpoints of %s", host)
	}
	text, err := json.MarshalIndent(found, "", " ") // sorts names
	return string(text) + "\n", err
}

// wordRestartProxy kills the proxy container of a workload's first pod and waits until its
// kubelet's next one is live.
func wordRestartProxy(ctx context.Context, s *scene) error {
	cluster, pod, err := s.pod(ctx)
	if err != nil {
		return err
	}
	before, err := s.uptime(ctx, cluster, pod)
	if err != nil {
		return err
	}
	if err := s.Signal(cluster, pod, stage.ProxyContainer, syscall.SIGKILL); err != nil {
		return err
	}
	killed := time.Now()
	took, err := stage.Until(ctx, stage.Patience, func() error {
		now, err := s.uptime(ctx, cluster, pod)
		if err == nil && now > before+time.Since(killed) {
			err = errors.New("the old Envoy still runs")
		}
		return err
	})
	s.out = fmt.Sprintf("live again after %v\n", took.Round(time.Millisecond))
	return err
}

var uptimeOf = regexp.MustCompile(`"uptime_current_epoch": "(\d+s)"`)

// uptime of the Envoy in a pod, which must be live.
func (s *scene) uptime(ctx context.Context, cluster, pod string) (time.Duration, error) {
	info, err := s.Envoy(ctx, cluster, pod+"/", "/server_info")
	if err != nil {
		return 0, err
	}
	m := uptimeOf.FindStringSubmatch(info)
	if m == nil || !strings.Contains(info, `"state": "LIVE"`) {
		return 0, fmt.Errorf("Envoy in %s is not live:\n%s", pod, info)
	}
	return time.ParseDuration(m[1])
}

func wordRotateKey(ctx context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	c, err := s.ClusterNamed(args[0])
	if err != nil {
		return err
	}
	return c.RotateSigningKey(ctx)
}

// wordRenew makes an agent renew its certificate, and waits until its Envoy uses the new one.
func wordRenew(ctx context.Context, s *scene) error {
	cluster, pod, err := s.pod(ctx)
	if err != nil {
		return err
	}
	before, err := s.serial(ctx, cluster, pod)
	if err != nil {
		return err
	}
	if err := s.Signal(cluster, pod, stage.ProxyContainer, syscall.SIGHUP); err != nil {
		return err
	}
	took, err := stage.Until(ctx, stage.Patience, func() error {
		now, err := s.serial(ctx, cluster, pod)
		if err == nil && now == before {
			err = fmt.Errorf("the certificate is still %s", before)
		}
		s.out = fmt.Sprintf("serial %s, before %s\n", now, before)
		return err
	})
	s.ts.Logf("renewed after %v", took.Round(time.Millisecond))
	return err
}

// wordForbid takes a kind out of what meshd may read in a member, or puts it back.
func wordForbid(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	c, err := s.ClusterNamed(args[0])
	if err != nil {
		return err
	}
	roles := c.Client().RbacV1().ClusterRoles()
	role, err := roles.Get(ctx, kube.ReaderAccount, metav1.GetOptions{})
	if err != nil {
		return err
	}
	about := func(r rbacv1.PolicyRule) bool { return slices.Contains(r.Resources, args[1]) }
	if s.verb == "forbid" {
		if !slices.ContainsFunc(role.Rules, about) {
			return fmt.Errorf("meshd may not read %s anyhow", args[1])
		}
		role.Rules = slices.DeleteFunc(role.Rules, about)
	} else {
		role.Rules = append(role.Rules, rbacv1.PolicyRule{APIGroups: []string{"*"}, Resources: args[1:2], Verbs: []string{"get", "list", "watch"}})
	}
	_, err = roles.Update(ctx, role, metav1.UpdateOptions{})
	return err
}

// serial of the certificate that the Envoy in a pod shows.
func (s *scene) serial(ctx context.Context, cluster, pod string) (string, error) {
	page, err := s.Envoy(ctx, cluster, pod+"/", "/certs")
	if err != nil {
		return "", err
	}
	var certs struct {
		Certificates []struct {
			Chain []struct {
				Serial string `json:"serial_number"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(page), &certs); err != nil {
		return "", err
	}
	for _, c := range certs.Certificates {
		if len(c.Chain) > 0 {
			return c.Chain[0].Serial, nil
		}
	}
	return "", fmt.Errorf("Envoy in %s shows no certificate", pod)
}

func wordFollow(ctx context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	if s.follows == nil {
		s.follows = map[string]*stage.Follow{}
	}
	s.follows[args[0]], err = s.Follow(ctx, args[1], args[2])
	return err
}

// wordFollowed waits longer than for anything else: pods may drain for 40 s.
func wordFollowed(_ context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	f, ok := s.follows[args[0]]
	if !ok {
		return fmt.Errorf("nothing is followed as %q", args[0])
	}
	s.out, err = f.Ended(2 * stage.Patience)
	return err
}

// wordPortion calls and checks what share of the answers came from one workload's pods.
func wordPortion(ctx context.Context, s *scene) error {
	args, rest, err := s.need(3)
	if err != nil {
		return err
	}
	low, err1 := strconv.ParseFloat(args[1], 64)
	high, err2 := strconv.ParseFloat(args[2], 64)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	calls := *s
	calls.args = rest
	err = wordCall(ctx, &calls)
	s.out = calls.out
	if err != nil {
		return err
	}
	all, own := 0, 0
	for _, m := range answersOfPod.FindAllStringSubmatch(s.out, -1) {
		n, err := strconv.Atoi(m[2])
		if err != nil {
			return err
		}
		all += n
		if strings.HasPrefix(m[1], args[0]+"-") {
			own += n
		}
	}
	share := float64(own) / float64(max(1, all))
	if share < low || share > high {
		return fmt.Errorf("share of %s is %.3f, want %v to %v:\n%s", args[0], share, low, high, s.out)
	}
	s.out = fmt.Sprintf("share of %s: %.3f\n%s", args[0], share, s.out)
	return nil
}

var answersOfPod = regexp.MustCompile(`[ ,][^ /]+/(\S+) (\d+)`)

func wordOperate(ctx context.Context, s *scene) error {
	c, args, err := s.control(2)
	if err != nil {
		return err
	}
	s.out, err = c.Operate(ctx, args...)
	return err
}

func wordLose(_ context.Context, s *scene) error {
	c, _, err := s.control(1)
	if err != nil {
		return err
	}
	return c.Lose()
}

func wordFront(_ context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	s.front, err = s.Stage.Front(args[0])
	return err
}

func wordMeanwhile(ctx context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	d, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	return ctx.Err()
}

// wordEtcdState shows every write, also one that was undone at once: it left a revision.
func wordEtcdState(ctx context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	client, err := s.etcdClient(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, stage.Patience)
	defer cancel()
	answer, err := client.Get(ctx, "/isthmus/"+args[0], clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	for _, kv := range answer.Kvs {
		s.out += fmt.Sprintf("%s written by revision %d\n", kv.Key, kv.ModRevision)
	}
	return nil
}

// etcdClient is a client of the external etcd.
func (s *scene) etcdClient(ctx context.Context) (*clientv3.Client, error) {
	if s.etcd == nil {
		return nil, errors.New("there is no external etcd")
	}
	return clientv3.New(clientv3.Config{
		Endpoints: s.etcd.Endpoints(), TLS: s.etcd.TLS(), Context: ctx,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return s.Laptop.Dial(ctx, "tcp", address)
		})},
	})
}
