#!/usr/bin/env bash
# Ends the engine of up.sh with everything that runs in it; images stay (rm -r $RDEV_E2E_DIR takes all).
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

lock
use_engine
if running engine; then
  # Bridges are the machine's and would outlive the engine.
  mapfile -t containers < <(docker ps --all --quiet)
  ((${#containers[@]} == 0)) || docker rm --force --volumes "${containers[@]}" >/dev/null || true
  docker network prune --force >/dev/null || true
  docker volume prune --force >/dev/null || true
  docker image prune --force >/dev/null || true
fi
stop engine
# Only ever empty ones: rmdir refuses a cgroup in which a process lives.
find /sys/fs/cgroup/rdev-e2e /sys/fs/cgroup/*/rdev-e2e -depth -type d -exec rmdir {} \; 2>/dev/null || true
rm -rf --one-file-system "$RUN"
say 'down'
