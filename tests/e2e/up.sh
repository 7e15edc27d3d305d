#!/usr/bin/env bash
# Starts the engine that engine.sh has unpacked. It changes neither the machine's firewall nor whether
# it forwards: containers reach this machine and those of their own network, and nothing beyond.
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

lock
use_engine
if running engine; then
  say 'the engine runs already'
  exit
fi
rm -rf --one-file-system "$RUN"
mkdir -p "$RUN/pids" "$RUN/run/containerd" "$LOGS" "$DATA"
# In mount and PID namespaces of its own, whose end is the end of every container. Shims keep their
# sockets in /run/containerd, whatever the engine is told.
start engine unshare --mount --pid --fork --kill-child --mount-proc bash -c '
  mkdir -p /run/containerd && mount --bind "$1/run/containerd" /run/containerd && shift && exec "$@"' - \
  "$RUN" "$ENGINE/usr/sbin/dockerd" --host "unix://$RUN/docker.sock" --data-root "$DATA" \
  --exec-root "$RUN/exec" --pidfile "$RUN/docker.pid" --bridge=none --iptables=false \
  --ip6tables=false --ip-masq=false --ip-forward=false --cgroup-parent=/rdev-e2e --init-path "$ENGINE/usr/bin/tini-static"
deadline=$((SECONDS + 60))
until docker info >/dev/null 2>&1; do
  running engine || die "the engine has ended: $(tail -n 3 "$LOGS/engine.log")"
  ((SECONDS < deadline)) || die "the engine does not answer: $(tail -n 3 "$LOGS/engine.log")"
  sleep 0.1
done
say "the engine runs: $DOCKER_HOST"
