#!/usr/bin/env bash
# Runs tests on a Docker engine: the one that answers, else one of its own, which is unpacked where it
# must be, started, and taken down at the end. Where that cannot be, the tests are told why
# (RDEV_TEST_NO_ENGINE): in words out of the closed list of tests/e2e/stack.py where it is the machine
# that cannot, and in others, which fail them, where a script did not do its work.
# usage: run.sh COMMAND...
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

can_fetch() {
  [[ ! -x $ENGINE/usr/sbin/dockerd ]] || return 0
  local folder
  folder=$(mktemp -d)
  (cd "$folder" && apt-get update -qq && apt-get download -qq -o APT::Sandbox::User=root tini) >&2 || {
    rm -r "$folder"
    return 1
  }
  rm -r "$folder"
}

can_group() { # version 2 of them, else the first controller of version 1 that containers are put into
  local place=/sys/fs/cgroup
  [[ -e $place/cgroup.controllers ]] || place=$place/memory
  mkdir "$place/rdev-e2e" && rmdir "$place/rdev-e2e"
}

can_bridge() {
  unshare --net sh -c 'ip link add b0 type bridge && ip link add v0 type veth peer name v1'
}

has_room() {
  (($(df --output=avail -B1000000 "$CLUSTER_DIR" | tail -n 1) >= ROOM_MB))
}

reason() { # prints why there can be no engine here; nothing where there can
  mkdir -p "$CLUSTER_DIR"
  if [[ $EUID != 0 ]]; then
    echo 'not root'
  elif [[ $(release) != bookworm ]]; then
    echo 'not Debian 12'
  elif ! has_room; then
    echo 'not enough disk'
  elif ! can_fetch; then
    echo 'no Debian package can be fetched'
  elif ! unshare --mount --pid --net --ipc --uts --fork true; then
    echo 'no namespaces can be made'
  elif ! can_group; then
    echo 'no control groups can be made'
  elif ! "$HERE/engine.sh" >&2; then
    echo 'engine.sh failed'
  elif ! can_bridge; then
    echo 'no bridges can be made'
  elif ! "$HERE/up.sh" >&2; then
    echo 'up.sh failed'
  elif ! "$HERE/base.sh" >&2; then
    echo 'base.sh failed'
  fi
}

(($#)) || die "usage: ${0##*/} COMMAND..."
if docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then
  say 'on the engine of this machine, with images of its registry'
else
  trap '"$HERE/down.sh"' EXIT
  why=$(reason)
  if [[ -n $why ]]; then
    say "without an engine: $why"
    export RDEV_TEST_NO_ENGINE=$why
  else
    use_engine
    export RDEV_TEST_DATABASE_IMAGE=$DATABASE
  fi
fi
if [[ -z ${RDEV_TEST_NO_ENGINE:-} ]]; then
  mkdir -p "$CLUSTER_DIR"
  make --no-print-directory -C "$ROOT" image ENGINE=docker ${RDEV_TEST_DATABASE_IMAGE:+BASE=$BASE} >"$CLUSTER_DIR/image.log" 2>&1 ||
    die "make image: $(tail -n 20 "$CLUSTER_DIR/image.log")"
  export RDEV_TEST_ENGINE=docker
fi
"$@"
