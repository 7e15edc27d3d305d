#!/usr/bin/env bash
# Ends a part of the running cluster by SIGKILL and starts it again; returns when it answers.
# usage: restart.sh kube-apiserver|kubelet
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

await() { # WHAT COMMAND...
  local what=$1 deadline=$((SECONDS + 120))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || die "waited too long for $what"
    sleep 0.1
  done
  say "$what"
}

ready() { kubectl --kubeconfig "$ADMIN_CONFIG" --cache-dir "$RUN/kubectl" get --raw /readyz; }

kubelet_pid() { # the node's first process is the child of the one that was recorded
  local node child
  read -r node _ <"$RUN/pids/node"
  child=$(pgrep --parent "$node")
  pgrep --parent "$child" --exact kubelet
}

other_kubelet() { [[ $(kubelet_pid) != "$1" ]]; }

lock
case $* in
kube-apiserver)
  running kube-apiserver || die 'no API server runs'
  mapfile -d '' argv <"$RUN/kube-apiserver.argv"
  stop kube-apiserver
  start kube-apiserver "${argv[@]}"
  await 'API server ready' ready
  ;;
kubelet)
  running node || die 'no node runs'
  pid=$(kubelet_pid)
  kill -KILL "$pid"
  await 'kubelet runs' other_kubelet "$pid"
  ;;
*) die "usage: ${0##*/} kube-apiserver|kubelet" ;;
esac
