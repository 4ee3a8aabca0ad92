// SPDX-License-Identifier: Apache-2.0

package api

import (
	"cmp"
	"maps"
	"slices"
)

// Code names a finding for good: a number is never given another meaning.
// The thousands tell the area: 1 commands and joining, 2 services, 3 clusters,
// 4 proxies, 5 configuration, 6 trust, 7 the control service, 8 virtual machines.
type Code string

// The codes.
const (
	ServerUnreachable    Code = "MESH1001"
	NotAnAdministrator   Code = "MESH1002"
	NoAdminConfig        Code = "MESH1003"
	TimedOut             Code = "MESH1004"
	UnknownName          Code = "MESH1005"
	InvalidInput         Code = "MESH1006"
	DuplicateCluster     Code = "MESH1010"
	DuplicateName        Code = "MESH1011"
	DuplicateKey         Code = "MESH1012"
	MissingPermission    Code = "MESH1013"
	MemberUnreachable    Code = "MESH1014"
	MeshdCannotReach     Code = "MESH1015"
	LoopbackAPIServer    Code = "MESH1016"
	CredentialRefused    Code = "MESH1017"
	NotSyncedInTime      Code = "MESH1018"
	NoGatewayAddress     Code = "MESH1019"
	PathBroken           Code = "MESH1020"
	PathNotProven        Code = "MESH1021"
	OverlappingAddresses Code = "MESH1022"
	StaticCredential     Code = "MESH1023"
	ApplyFailed          Code = "MESH1024"
	LeftBehind           Code = "MESH1025"
	MalformedObject      Code = "MESH2101"
	ManyEndpoints        Code = "MESH2102"
	OverBudget           Code = "MESH2103"
	ObjectTooLarge       Code = "MESH2104"
	IstioProxies         Code = "MESH2105"
	PortProtocolConflict Code = "MESH2201"
	ServiceTypeConflict  Code = "MESH2202"
	PortNameConflict     Code = "MESH2203"
	OutsideGrant         Code = "MESH2204"
	NoProxyBeside        Code = "MESH2205"
	ClusterUnreachable   Code = "MESH3001"
	ClusterNotSynced     Code = "MESH3002"
	CredentialsExpired   Code = "MESH3003"
	WatchLag             Code = "MESH3004"
	ClusterNoGateway     Code = "MESH3005"
	AnotherCluster       Code = "MESH3006"
	ClusterSetAside      Code = "MESH3007"
	ResourceNotBuilt     Code = "MESH4001"
	PartlyTranslated     Code = "MESH4002"
	ProxyPending         Code = "MESH4101"
	ProxyRejected        Code = "MESH4102"
	ConfigNotTranslated  Code = "MESH5001"
	ConfigConflict       Code = "MESH5002"
	ConfigInvalid        Code = "MESH5003"
	ConfigIgnored        Code = "MESH5004"
	AuthorityMissing     Code = "MESH6001"
	CertificateExpiring  Code = "MESH6002"
	AuditNotWritable     Code = "MESH6003"
	AuditChanged         Code = "MESH6004"
	StoreUnreadable      Code = "MESH7001"
	ValuesQuarantined    Code = "MESH7002"
	StoreNearlyFull      Code = "MESH7003"
	StoreReadOnly        Code = "MESH7004"
	StoreBehind          Code = "MESH7005"
	NetworkNoGateway     Code = "MESH8001"
	VMUnhealthy          Code = "MESH8002"
	VMLost               Code = "MESH8003"
	VMTokenExpired       Code = "MESH8004"
)

// Explanation is the long form of a Code: what `mesh explain CODE` prints.
type Explanation struct {
	Code    Code
	Title   string // one line
	Meaning string // what it means, and what still works
	Remedy  string // what to do, in order
}

// Explain returns the explanation of a code; false for one that does not exist.
func Explain(c Code) (Explanation, bool) {
	e, ok := explanations[c]
	e.Code = c
	return e, ok
}

// Explanations returns all of them in the order of their codes.
func Explanations() []Explanation {
	all := make([]Explanation, 0, len(explanations))
	for _, c := range slices.SortedFunc(maps.Keys(explanations), cmp.Compare[Code]) {
		e, _ := Explain(c)
		all = append(all, e)
	}
	return all
}

var explanations = map[Code]Explanation{
	ServerUnreachable: {
		Title:   "meshd does not answer",
		Meaning: "The command could not open a connection to the admin port of meshd. Proxies do not need that port: traffic between services goes on.",
		Remedy:  "Check that meshd runs, and that the address in admin.conf (or --server, MESH_SERVER) is the one of its admin port, 8443 by default.",
	},
	NotAnAdministrator: {
		Title:   "meshd does not accept the certificate as an administrator's",
		Meaning: "Every call of the admin API needs a client certificate that the mesh's own authority issued to an administrator; there are no anonymous calls, also not from the machine meshd runs on.",
		Remedy:  "Copy admin.conf anew from meshd's data directory; meshd writes it at its first start and renews it. A file from before a restore or of another mesh does not work.",
	},
	NoAdminConfig: {
		Title:   "there is no usable admin.conf",
		Meaning: "The command does not know where meshd is or who you are.",
		Remedy:  "Copy admin.conf from meshd's data directory to ~/.config/isthmus/admin.conf, or name it by --config or MESH_CONFIG.",
	},
	TimedOut: {
		Title:   "it took longer than allowed",
		Meaning: "The command gave up waiting. What was being waited for, and its last state, stand in the message. Steps that were done stay done.",
		Remedy:  "Run the same command again: finished steps say \"unchanged\". A longer time is allowed by --timeout.",
	},
	UnknownName: {
		Title:   "there is nothing of that name",
		Meaning: "The name was not found. Names that look like it are listed.",
		Remedy:  "Use one of the listed names, or list all with the same command without a name.",
	},
	InvalidInput: {
		Title:   "a value is not acceptable",
		Meaning: "Something that was given is malformed or contradicts something else that was given.",
		Remedy:  "The message names the field, its value, and what would be right.",
	},
	DuplicateCluster: {
		Title:   "this cluster has joined already",
		Meaning: "A cluster is recognised by the UID of its namespace kube-system, not by its name or address. A member with this UID exists under another name.",
		Remedy:  "Look at it with mesh clusters. To give it another name, let it leave first: mesh leave cluster OLD.",
	},
	DuplicateName: {
		Title:   "another cluster has this name",
		Meaning: "A member of this name exists, and it is a different cluster: the UID of its namespace kube-system differs.",
		Remedy:  "Choose another name. If the old cluster was rebuilt, add --replace; if it is gone for good: mesh leave cluster NAME --force.",
	},
	DuplicateKey: {
		Title:   "another cluster signs its tokens with the same key",
		Meaning: "meshd tells clusters apart by the key that verifies their service account tokens. With one key for two clusters, each could obtain the identities of the other.",
		Remedy:  "Give one of the clusters a service account signing key of its own (kube-apiserver --service-account-signing-key-file). This happens when clusters are cloned.",
	},
	MissingPermission: {
		Title:   "your account in the member cluster may not do what a join needs",
		Meaning: "Before anything is changed, the command asks the cluster whether you may apply what a member needs. The missing permissions are listed one a line.",
		Remedy:  "Use a context whose user has these permissions (usually cluster-admin), or have the manifests applied by somebody who may: mesh join cluster NAME --output-dir DIR writes them. A join after that looks whether they are as they are to be, and needs no more than to create tokens for meshd's accounts (serviceaccounts/token in isthmus-system).",
	},
	MemberUnreachable: {
		Title:   "this machine does not reach the member's API server",
		Meaning: "The kubeconfig's context could not be used from here.",
		Remedy:  "Try kubectl --context CONTEXT version. A VPN or an expired login is the usual cause.",
	},
	MeshdCannotReach: {
		Title:   "meshd does not reach the member's API server",
		Meaning: "meshd watches the member's API server directly. The address of your kubeconfig need not be one that works from where meshd runs.",
		Remedy:  "Name the address that works from there: --api-server https://HOST:PORT, and open the firewall on the way.",
	},
	LoopbackAPIServer: {
		Title:   "the API server's address is a loopback address",
		Meaning: "An address such as 127.0.0.1 leads meshd to itself. Tools that run clusters on a laptop write such addresses into the kubeconfig.",
		Remedy:  "Name the address by which meshd can reach the cluster: --api-server https://HOST:PORT.",
	},
	CredentialRefused: {
		Title:   "the member's API server refuses the credential",
		Meaning: "The token or certificate that meshd was given is expired, revoked, or of another cluster.",
		Remedy:  "Run mesh join cluster again with the same name: it obtains a new credential and changes nothing else.",
	},
	NotSyncedInTime: {
		Title:   "the services of the member have not arrived in time",
		Meaning: "meshd shows nothing of a cluster before it has read every kind of object once. The message names the kind that is missing and why.",
		Remedy:  "Run the same command again; it continues. If a permission is missing, the join has to be done again by an account that may grant it.",
	},
	NoGatewayAddress: {
		Title:   "the east-west gateway has no address",
		Meaning: "Other networks reach this one through its gateway. Its Service has no address yet, usually because nothing in the cluster hands out addresses to Services of type LoadBalancer. Calls inside the network and calls out of it work.",
		Remedy:  "Wait, install a load balancer, or name the address yourself: --gateway-address HOST:15443.",
	},
	PathBroken: {
		Title:   "a path between networks does not work",
		Meaning: "A connection through an address of a gateway failed, or did not end in mutual TLS with that very gateway. The message says from where, how far it came, and why.",
		Remedy:  "Open port 15443 of the gateway's address for the other networks; check the address with mesh clusters -o wide. If the address leads to another cluster's gateway, name the right one by --gateway-address.",
	},
	PathNotProven: {
		Title:   "a path between networks could not be proven",
		Meaning: "Nobody could try the path from there, since no gateway of that cluster is connected to any replica of meshd; or the gateway is not one that mesh join installed, so no agent of ours answers behind it, and no workload of the mesh does yet. It may work.",
		Remedy:  "See mesh proxies --cluster NAME: a gateway that is not listed does not reach meshd at --advertise (15012). Behind a gateway of another making, inject a workload. Then: mesh check.",
	},
	OverlappingAddresses: {
		Title:   "address ranges overlap",
		Meaning: "Pods of two clusters on one network share addresses, or a cluster uses the range from which the mesh takes virtual addresses. On different networks the same ranges are fine.",
		Remedy:  "Put the clusters on different networks: mesh join cluster NAME --network OTHER. The ranges of virtual addresses, 240.240.0.0/12 and 2001:2::/48, cannot be changed yet.",
	},
	StaticCredential: {
		Title:   "the credential cannot be renewed by meshd",
		Meaning: "The given Secret holds a credential without an end, or one that meshd may not renew. It stays valid wherever it was copied to.",
		Remedy:  "Join with a kubeconfig context instead: meshd then holds a 24 h token that it renews itself.",
	},
	ApplyFailed: {
		Title:   "an object could not be applied in the member cluster",
		Meaning: "The member's API server refused an object. A name in conflict belongs to another field manager.",
		Remedy:  "The message has the API server's reason. Run the same command again when it is settled.",
	},
	LeftBehind: {
		Title:   "something remains in the cluster that left",
		Meaning: "The listed objects could not be removed, or were not touched because the cluster was not reachable. They do no harm: the credentials in them are no longer accepted by the mesh.",
		Remedy:  "Delete them with the printed commands when the cluster is reachable.",
	},
	MalformedObject: {
		Title:   "part of an object in a cluster cannot be right and is ignored",
		Meaning: "A field of a Service, an EndpointSlice or a Pod is malformed, for example an address that is none. Only that part is left out.",
		Remedy:  "Correct the object that the message names; whoever writes it is usually a controller.",
	},
	ManyEndpoints: {
		Title:   "a service has very many endpoints",
		Meaning: "The service has more endpoints than is reasonable, or more than a cluster may report for one service; in the latter case the rest is left out.",
		Remedy:  "Check whether the selector of the service is too wide.",
	},
	OverBudget: {
		Title:   "a cluster reports more than it may",
		Meaning: "What goes beyond the budget of one cluster is left out, so that one cluster cannot take the others down.",
		Remedy:  "Find out what the cluster has so many of: mesh services --cluster NAME.",
	},
	ObjectTooLarge: {
		Title:   "an object is too large and is left out",
		Meaning: "The object is larger than what the store takes, for example because of a huge annotation.",
		Remedy:  "Make the object that the message names smaller.",
	},
	IstioProxies: {
		Title:   "a cluster has proxies of Istio's, and did not opt in to them",
		Meaning: "Pods with Istio's proxy speak mutual TLS with certificates of Istio's authority, which the mesh's proxies do not trust. So they count as pods without a proxy: they are called in plaintext, other networks do not reach them, and Istio's east-west gateways are not used.",
		Remedy:  "If they get their certificates from the mesh, run the join again with --allow-istio-ca. If not, give them the mesh's proxy: mesh inject -f FILE | kubectl apply -f -",
	},
	PortProtocolConflict: {
		Title:   "clusters disagree on the protocol of a port",
		Meaning: "Services of one namespace and name are one service. Where their ports disagree in protocol, each cluster follows its own, and endpoints of records that disagree are left out of that port.",
		Remedy:  "Give the port the same appProtocol or the same name prefix in every cluster.",
	},
	ServiceTypeConflict: {
		Title:   "clusters disagree on the type or the visibility of a service",
		Meaning: "One cluster has the service with a cluster IP and another one without, or one keeps it to itself. Each cluster follows its own; services of type ExternalName never merge.",
		Remedy:  "Give the service the same type and the same annotations in every cluster, or another name in one of them.",
	},
	OutsideGrant: {
		Title:   "a cluster offers something it was not granted",
		Meaning: "Services, workloads and configuration outside of the grant of a cluster are left out, and identities outside of it are not issued.",
		Remedy:  "If it should be allowed, run the join again with another --grant.",
	},
	NoProxyBeside: {
		Title:   "endpoints have no proxy and are out of reach for other networks",
		Meaning: "Gateways forward mutual TLS without ending it, so only a workload with a proxy can answer a call from another network. Callers on the same network reach these endpoints in plaintext.",
		Remedy:  "Inject the proxy: mesh inject -f FILE | kubectl apply -f -",
	},
	PortNameConflict: {
		Title:   "clusters name a port differently",
		Meaning: "The number of a port is its key; traffic is not affected by a differing name.",
		Remedy:  "Use the same name everywhere, because routing rules and dashboards may refer to it.",
	},
	ClusterUnreachable: {
		Title:   "meshd has lost the API server of a cluster",
		Meaning: "Its last known endpoints are still served, marked as stale. Its workloads keep their certificates and configuration.",
		Remedy:  "Check the cluster's API server and the way to it: mesh clusters NAME -o yaml has the error and since when.",
	},
	ClusterNotSynced: {
		Title:   "a cluster has not been read completely",
		Meaning: "At least one kind of object could not be read. meshd changes nothing of what it knew before.",
		Remedy:  "mesh clusters NAME -o yaml names the kind. A missing permission is mended by running mesh join cluster NAME again.",
	},
	CredentialsExpired: {
		Title:   "meshd's credential for a cluster has expired",
		Meaning: "meshd was away from the cluster for longer than its credential lives, so it could not renew it. Last known endpoints are served.",
		Remedy:  "mesh join cluster NAME --context CONTEXT --network NETWORK",
	},
	WatchLag: {
		Title:   "a cluster's changes arrive late",
		Meaning: "The age of what meshd knows about the cluster is above the limit.",
		Remedy:  "Look at the load of the member's API server and of meshd, and at the network between them.",
	},
	ClusterNoGateway: {
		Title:   "a cluster's network cannot be entered",
		Meaning: "No east-west gateway of the network is ready with an address, so other networks get no endpoints of it.",
		Remedy:  "kubectl -n isthmus-system get deployment,service isthmus-eastwestgateway in that cluster.",
	},
	AnotherCluster: {
		Title:   "another cluster answers behind a cluster's address",
		Meaning: "The UID of kube-system behind the API server's address is not the one that joined. Nothing is read from it.",
		Remedy:  "If the cluster was rebuilt: mesh join cluster NAME --replace. Otherwise correct its address: --api-server.",
	},
	ClusterSetAside: {
		Title:   "other clusters call a cluster last, or not at all",
		Meaning: "Its API server has been away for longer than meshd's --demote-after: its endpoints go behind everybody else's. If its gateways are away too, for meshd and for every other network, and longer than --drain-after, it is drained: others call it only for services that nobody else has. Its own proxies go on with all they have. Nothing is deleted; it counts in full again as soon as its API server answers.",
		Remedy:  "Bring its API server back, or its gateways. If it is gone for good: mesh leave cluster NAME --force.",
	},
	ResourceNotBuilt: {
		Title:   "a resource for proxies cannot be built",
		Meaning: "The named object leads to a configuration that Envoy would refuse. Proxies that have an earlier version keep it; everything else is served.",
		Remedy:  "Correct the object that the message names.",
	},
	PartlyTranslated: {
		Title:   "part of a configuration object has no effect",
		Meaning: "The object is in force, but for the named field, which this version does not translate or cannot honour there.",
		Remedy:  "The message names the field and what would be right.",
	},
	ProxyPending: {
		Title:   "a proxy has not acknowledged its configuration",
		Meaning: "The proxy was sent something and has not answered since. It goes on with what it has.",
		Remedy:  "mesh proxies NAME -o yaml; a proxy without processor time is the usual cause.",
	},
	ProxyRejected: {
		Title:   "a proxy rejected its configuration",
		Meaning: "Envoy refused a resource and goes on with the last one it accepted. The message is Envoy's own.",
		Remedy:  "Correct the object that the message names; meshd sends the next version by itself.",
	},
	ConfigNotTranslated: {
		Title:   "a configuration object has no effect yet",
		Meaning: "The object is stored, but this version of the mesh does not translate its kind.",
		Remedy:  "Remove it, or wait for a version that does; docs/reference/compatibility.md lists the kinds.",
	},
	ConfigConflict: {
		Title:   "two primaries disagree on a configuration object",
		Meaning: "The same object differs between primaries. The older one applies everywhere.",
		Remedy:  "Make both equal, or delete one.",
	},
	ConfigInvalid: {
		Title:   "a configuration object is invalid",
		Meaning: "The object is ignored; what was in force before it stays in force.",
		Remedy:  "The message names the field, its value, and what would be right.",
	},
	ConfigIgnored: {
		Title:   "a configuration object in a remote cluster does nothing",
		Meaning: "Only primary clusters contribute configuration.",
		Remedy:  "Put the object into a primary, or make this cluster one: mesh join cluster NAME --primary.",
	},
	AuthorityMissing: {
		Title:   "there is no authority that can sign",
		Meaning: "Certificates are neither issued nor renewed. Existing ones work until they end.",
		Remedy:  "Look at meshd's log; the sealing key may be missing from the data directory after a restore.",
	},
	CertificateExpiring: {
		Title:   "a certificate of the mesh ends soon",
		Meaning: "An authority or meshd's own certificate has less than a tenth of its life left.",
		Remedy:  "Look at meshd's log for why it is not renewed.",
	},
	AuditNotWritable: {
		Title:   "the audit log cannot be written",
		Meaning: "Nothing is issued, renewed or changed without a line in the log: this replica refuses all of it. Certificates that are out work until they end.",
		Remedy:  "The message has the reason; usually the disk of meshd's data directory is full. It goes on by itself once there is room.",
	},
	AuditChanged: {
		Title:   "the audit log was changed behind meshd's back",
		Meaning: "It is not the log whose head was kept in the store: somebody shortened or rewrote it, or put an older copy back. Its head is not kept any more, so that the evidence stays.",
		Remedy:  "Run mesh activity verify, keep a copy of audit.jsonl, find out who could write to it; then move it away and restart meshd, which begins a new one.",
	},
	StoreUnreadable: {
		Title:   "meshd cannot read its store",
		Meaning: "etcd is away. Proxies keep their configuration and certificates are still signed for a while; changes wait.",
		Remedy:  "Bring etcd back; mesh check says when it is read again.",
	},
	ValuesQuarantined: {
		Title:   "values in the store cannot be read",
		Meaning: "A value does not decode. It is left where it is and has no effect; everything else works.",
		Remedy:  "The message names the keys. Records come again from their clusters; others need a restore.",
	},
	StoreNearlyFull: {
		Title:   "the store is nearly full",
		Meaning: "etcd refuses writes once its quota is used up.",
		Remedy:  "Raise the quota (etcd --quota-backend-bytes), and look for what writes so much.",
	},
	StoreReadOnly: {
		Title:   "meshd only reads its store",
		Meaning: "A newer meshd has written values that this version does not know. It changes nothing.",
		Remedy:  "Upgrade this meshd.",
	},
	StoreBehind: {
		Title:   "a replica lags behind the store",
		Meaning: "The replica has not seen the latest changes for a while; its proxies may have older configuration.",
		Remedy:  "Look at the replica's load and its connection to etcd.",
	},
	NetworkNoGateway: {
		Title:   "a network with virtual machines has no gateway",
		Meaning: "Its machines can call out, but calls to them from other networks have no way in and get no endpoint.",
		Remedy:  "Join a cluster on that network, or put the machine on the network of one.",
	},
	VMUnhealthy: {
		Title:   "a virtual machine is unhealthy",
		Meaning: "Its agent reports that its health check fails. It gets no new connections.",
		Remedy:  "The message has the check's outcome; look at the service on the machine.",
	},
	VMLost: {
		Title:   "a virtual machine has stopped reporting",
		Meaning: "Its agent is gone or cut off. It gets no connections until it is back; it needs no new token then.",
		Remedy:  "Start the agent on the machine, or take the machine out: mesh vm offboard NAME.",
	},
	VMTokenExpired: {
		Title:   "a virtual machine needs a new token",
		Meaning: "Its join token, which can be used once and for a short time only, ended before it came; or its certificate ended while it was away, so that it cannot renew itself.",
		Remedy:  "Run mesh vm onboard NAME (the name is enough), and paste the line that it prints on the machine again: it asks for the new token.",
	},
}
