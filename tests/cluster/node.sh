#!/usr/bin/env bash
# containerd and the kubelet, started by up.sh in a mount and a PID namespace of
# their own, in which this is the first process: when it is killed, the kernel
# kills every container with it and takes every mount away.
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

# Places that containerd, the network plugins or the kubelet write to, whatever
# they are told; here they are folders of the cluster.
for place in /run/containerd /run/netns /var/lib/cni /var/lib/kubelet /var/log/containers /var/log/pods; do
  mkdir -p "$place" "$RUN/node$place"
  mount --bind "$RUN/node$place" "$place"
done

containerd --config "$RUN/containerd.toml" >"$LOGS/containerd.log" 2>&1 &
until ctr_k8s version >/dev/null 2>&1; do
  kill -0 $! || exit 1
  sleep 0.05
done
CONTAINERD=$!
# A kubelet that ends is started again, as a node's init does (restart.sh ends it); containers stay.
while :; do
  "$BIN/kubelet" --config="$RUN/kubelet.yaml" --kubeconfig="$RUN/kubelet.kubeconfig" \
    --hostname-override=localhost --node-ip="$HOST_IP" --container-runtime=remote \
    --container-runtime-endpoint="unix://$RUN/containerd.sock" --containerd="$RUN/containerd.sock" \
    >>"$LOGS/kubelet.log" 2>&1 &
  wait -n || true
  kill -0 $CONTAINERD 2>/dev/null || exit 1 # the node ends with containerd
  sleep 0.2
done
