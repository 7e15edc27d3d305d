#!/usr/bin/env bash
# Starts an empty Kubernetes cluster on this machine; the last line that it
# prints, alone on standard output, is the path of the administrator's kubeconfig.
# usage: up.sh [--control-plane-only]    without a node pods stay Pending, and root is not needed
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"
PKI=$RUN/pki

certificate() { # NAME SUBJECT [ALTERNATIVE-NAMES]
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "$2" \
    -keyout "$PKI/$1.key" -out "$PKI/$1.csr" 2>/dev/null
  openssl x509 -req -in "$PKI/$1.csr" -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial \
    -days 30 -out "$PKI/$1.crt" -extfile <(
      echo 'extendedKeyUsage=serverAuth,clientAuth'
      echo "subjectAltName=${3:-DNS:$1}"
    ) 2>/dev/null
}

kubeconfig() { # FILE NAMESPACE USER: everything is in the file, so that it can be copied
  (
    umask 077
    cat >"$1" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: rdev, cluster: {server: "https://127.0.0.1:$API_PORT", certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")}}]
users: [{name: rdev, user: {$3}}]
contexts: [{name: rdev, context: {cluster: rdev, user: rdev, namespace: $2}}]
current-context: rdev
YAML
  )
}

by_certificate() { # NAME
  echo "client-certificate-data: $(base64 -w0 "$PKI/$1.crt"), client-key-data: $(base64 -w0 "$PKI/$1.key")"
}

make_credentials() { # new ones for every cluster, so that none ever expires or leaks
  mkdir -m 700 "$PKI"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 \
    -subj /CN=rdev-test -keyout "$PKI/ca.key" -out "$PKI/ca.crt" 2>/dev/null
  openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/serviceaccounts.key"
  openssl pkey -in "$PKI/serviceaccounts.key" -pubout -out "$PKI/serviceaccounts.pub"
  certificate apiserver /CN=kube-apiserver DNS:localhost,IP:127.0.0.1,IP:$HOST_IP
  certificate apiserver-to-kubelet /O=system:masters/CN=apiserver-to-kubelet
  certificate admin /O=system:masters/CN=admin
  certificate kcm /CN=system:kube-controller-manager
  certificate scheduler /CN=system:kube-scheduler
  certificate kubelet /O=system:nodes/CN=system:node:localhost DNS:localhost
  kubeconfig "$ADMIN_CONFIG" default "$(by_certificate admin)"
  local name
  for name in kcm scheduler kubelet; do
    kubeconfig "$RUN/$name.kubeconfig" default "$(by_certificate "$name")"
  done
}

admin() { kubectl --kubeconfig "$ADMIN_CONFIG" --cache-dir "$RUN/kubectl" "$@"; }

wait_for() { # NAME WHAT COMMAND...: until COMMAND succeeds, while NAME runs
  local name=$1 what=$2 deadline=$((SECONDS + 120))
  shift 2
  until "$@" >/dev/null 2>&1; do
    running "$name" || die "$name ended"
    ((SECONDS < deadline)) || die "waited too long for $what"
    sleep 0.1
  done
  say "$what"
}

start_control_plane() {
  start etcd etcd --name rdev --data-dir "$RUN/etcd" --unsafe-no-fsync \
    --listen-client-urls "http://127.0.0.1:$ETCD_PORT" \
    --advertise-client-urls "http://127.0.0.1:$ETCD_PORT" \
    --listen-peer-urls "http://127.0.0.1:$ETCD_PEER_PORT" \
    --initial-advertise-peer-urls "http://127.0.0.1:$ETCD_PEER_PORT" \
    --initial-cluster "rdev=http://127.0.0.1:$ETCD_PEER_PORT"
  # Which rights rdev uses: tests/cluster/test_deploy.py reads it.
  cat >"$RUN/audit.yaml" <<'YAML'
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: Metadata, userGroups: ["system:serviceaccounts:rdev"]}
  - {level: None}
YAML
  # From 1.21 on a finished Job goes by itself; here it must be asked for (the migration's says when).
  local gates=--feature-gates=TTLAfterFinished=true
  # It insists on an address other than loopback to advertise; nothing uses it.
  local api_server=("$BIN/kube-apiserver" "$gates" --audit-policy-file="$RUN/audit.yaml" \
    --audit-log-path="$RUN/audit.log" --etcd-servers="http://127.0.0.1:$ETCD_PORT" \
    --bind-address=127.0.0.1 --secure-port=$API_PORT \
    --advertise-address=$HOST_IP --endpoint-reconciler-type=none \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
    --client-ca-file="$PKI/ca.crt" --authorization-mode=Node,RBAC \
    --enable-admission-plugins=NodeRestriction --service-cluster-ip-range=$SERVICE_SUBNET \
    --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$PKI/serviceaccounts.pub" \
    --service-account-signing-key-file="$PKI/serviceaccounts.key" \
    --kubelet-client-certificate="$PKI/apiserver-to-kubelet.crt" \
    --kubelet-client-key="$PKI/apiserver-to-kubelet.key" \
    --kubelet-certificate-authority="$PKI/ca.crt" --kubelet-preferred-address-types=Hostname)
  printf '%s\0' "${api_server[@]}" >"$RUN/kube-apiserver.argv" # restart.sh reads it
  start kube-apiserver "${api_server[@]}"
  wait_for kube-apiserver 'API server ready' admin get --raw /readyz
  start kube-controller-manager "$BIN/kube-controller-manager" "$gates" \
    --kubeconfig="$RUN/kcm.kubeconfig" --use-service-account-credentials --leader-elect=false \
    --service-account-private-key-file="$PKI/serviceaccounts.key" --root-ca-file="$PKI/ca.crt" \
    --flex-volume-plugin-dir="$RUN/flexvolume" --port=0 --secure-port=0 \
    --node-monitor-period=1s --kube-api-qps=500 --kube-api-burst=500 # pods can start sooner
  start kube-scheduler "$BIN/kube-scheduler" --kubeconfig="$RUN/scheduler.kubeconfig" \
    --leader-elect=false --port=0 --secure-port=0
}

configure_node() {
  mkdir "$RUN/cni"
  # A pod reaches the host at the bridge's address and the other pods, nothing
  # else: then neither forwarding nor the firewall has to be changed.
  cat >"$RUN/cni/rdev.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "rdev", "plugins": [{"type": "bridge", "bridge": "$BRIDGE", "ipam": {
  "type": "host-local", "ranges": [[{"subnet": "$POD_SUBNET", "gateway": "$HOST_IP"}]],
  "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
  cat >"$RUN/containerd.toml" <<TOML
version = 2
root = "$RUN/containerd"
oom_score = 0
[grpc]
  address = "$RUN/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$RUN/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/rdev/busybox:test"
  restrict_oom_score_adj = true # lowering it takes a capability that root may lack in a VM or container
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$RUN/cni"
TOML
  # A name cannot be looked up in a pod: this makes it fail at once.
  echo 'nameserver 127.0.0.1' >"$RUN/resolv.conf"
  cat >"$RUN/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: $KUBELET_PORT
healthzPort: 0
tlsCertFile: $PKI/kubelet.crt
tlsPrivateKeyFile: $PKI/kubelet.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
resolvConf: $RUN/resolv.conf
volumePluginDir: $RUN/flexvolume
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 1s
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%}
YAML
  # The kubelet sets these; down.sh sets them back.
  sysctl vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops \
    kernel.keys.root_maxkeys kernel.keys.root_maxbytes >"$RUN/sysctl"
  ip link add "$BRIDGE" type bridge
  ip address add "$HOST_IP/${POD_SUBNET#*/}" dev "$BRIDGE"
  ip link set "$BRIDGE" up
}

node_ready() { # Ready, and no taint that keeps pods away any more
  [[ $(admin get node localhost \
    -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}{.spec.taints}') == True ]]
}

start_node() {
  configure_node
  start node unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$HERE/node.sh"
  wait_for node 'containerd ready' ctr_k8s version
  local archive
  "$HERE/image.sh" busybox
  for archive in "$IMAGES"/*.tar; do
    [[ $archive == */busybox.tar ]] || ctr_k8s images import "$archive" >/dev/null
  done
  wait_for node 'node ready' node_ready
}

# Nothing here makes volumes for claims, so there is a stock: folders that go with the cluster. Local
# ones, which the kubelet gives to a pod's fsGroup as it does with a cloud's disks.
volumes() {
  local number
  for number in {1..20}; do
    mkdir -p "$RUN/volumes/$number"
    cat <<YAML
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: stock-$number}
spec:
  accessModes: [ReadWriteOnce]
  capacity: {storage: 20Gi}
  persistentVolumeReclaimPolicy: Retain
  local: {path: $RUN/volumes/$number}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: Exists}]}]}}
YAML
  done
}

# Where tests make project pods and let rdev reach them, with no right but those they need.
# tests/cluster/test_deploy.py tries the role of deploy/k8s itself.
make_namespace() {
  admin apply -f "$HERE/stubs.yaml" >/dev/null
  volumes | admin apply -f - >/dev/null
  admin apply -f - >/dev/null <<YAML
apiVersion: v1
kind: List
items:
  - {apiVersion: v1, kind: Namespace, metadata: {name: rdev}}
  - {apiVersion: v1, kind: ServiceAccount, metadata: {name: rdev, namespace: rdev}}
  - apiVersion: rbac.authorization.k8s.io/v1
    kind: Role
    metadata: {name: rdev, namespace: rdev}
    rules:
      - {apiGroups: [""], resources: [namespaces], resourceNames: [rdev], verbs: [get]}
      - {apiGroups: [""], resources: [pods, persistentvolumeclaims], verbs: [get, list, watch, create, delete, patch]}
      - {apiGroups: [""], resources: [pods/exec], verbs: [get, create]}
      - {apiGroups: [""], resources: [pods/log], verbs: [get]}
  - apiVersion: rbac.authorization.k8s.io/v1
    kind: RoleBinding
    metadata: {name: rdev, namespace: rdev}
    roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: rdev}
    subjects: [{kind: ServiceAccount, name: rdev, namespace: rdev}]
YAML
  local token
  token=$(echo '{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
    "spec": {"expirationSeconds": 2592000}}' |
    admin create --raw /api/v1/namespaces/rdev/serviceaccounts/rdev/token -f - |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["status"]["token"])')
  kubeconfig "$RDEV_CONFIG" rdev "token: $token"
  # A pod is refused as long as its namespace's default account has no token.
  wait_for kube-controller-manager 'namespace rdev ready' default_account
}

default_account() {
  [[ -n $(admin -n rdev get serviceaccount default -o 'jsonpath={.secrets}') ]]
}

check() {
  local name port
  for name in "${BINARIES[@]}"; do
    [[ -x $BIN/$name ]] || die "no $BIN/$name: run build.sh first"
  done
  [[ ${parts[*]} != *node || $EUID == 0 ]] || die 'a node needs root; --control-plane-only does not'
  for port in $API_PORT $ETCD_PORT $ETCD_PEER_PORT $KUBELET_PORT; do
    ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || die "something listens on port $port"
  done
}

failed() { # one that does not come up is taken down, with a word of why; its logs stay
  tail -n 3 "$LOGS"/*.log | cut -c 1-300 >&2
  "$HERE/down.sh"
}

complete() {
  local name
  for name in "${parts[@]}"; do running "$name" || return 1; done
}

parts=(etcd kube-apiserver kube-controller-manager kube-scheduler)
case $* in
'') parts+=(node) ;;
--control-plane-only) ;;
*) die "usage: ${0##*/} [--control-plane-only]" ;;
esac
lock
if [[ -f $RUN/parts && $(<"$RUN/parts") != "${parts[*]}" ]] && running kube-apiserver; then
  die 'a cluster of the other kind runs: run down.sh first'
elif complete; then
  say 'it runs already'
else
  [[ ! -d $RUN ]] || "$HERE/down.sh" # what is left of one that ended by itself
  check
  trap failed EXIT
  mkdir -p "$RUN/pids" "$LOGS"
  rm -f "$LOGS"/*.log
  echo "${parts[*]}" >"$RUN/parts"
  make_credentials
  start_control_plane
  [[ ${parts[*]} != *node ]] || start_node
  make_namespace
  trap - EXIT
fi
echo "$ADMIN_CONFIG"
