#!/usr/bin/env bash
# Docker's engine and compose out of Debian's packages, unpacked and not installed. Does nothing where
# they are there already.
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

PACKAGES=(containerd debootstrap iproute2 iptables libdevmapper1.02.1 runc)
# Debian 12 has compose 1 alone: compose 2 is the next release's, and runs on this one.
COMPOSE_RELEASE=trixie

# Lists of our own leave the machine's as they are and still follow its other settings (proxy, keys).
get_compose() {
  local apt=$CLUSTER_DIR/apt
  rm -rf "$apt"
  mkdir -p "$apt"/{lists/partial,cache/archives/partial}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(debian_mirror) $COMPOSE_RELEASE main" \
    >"$apt/sources.list"
  cat >"$apt/apt.conf" <<APT
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
Acquire::Languages "none";
APT::Sandbox::User "root";
APT
  (
    export APT_CONFIG=$apt/apt.conf
    apt-get update -qq
    apt-get download -qq docker-compose
  )
  rm -rf "$apt"
}

unpack() {
  local deb
  rm -rf "$CLUSTER_DIR/debs" "$ENGINE.new"
  mkdir -p "$CLUSTER_DIR/debs" "$ENGINE.new" "$CLUSTER_DIR/config/cli-plugins"
  cd "$CLUSTER_DIR/debs"
  apt-get download -qq -o APT::Sandbox::User=root docker.io tini
  get_compose
  for deb in *.deb; do dpkg-deb -x "$deb" "$ENGINE.new"; done
  cd /
  mv "$ENGINE.new" "$ENGINE"
  ln -sfn "$ENGINE/usr/libexec/docker/cli-plugins/docker-compose" "$CLUSTER_DIR/config/cli-plugins/docker-compose"
  rm -rf "$CLUSTER_DIR/debs"
}

(($# == 0)) || die "usage: ${0##*/}, without arguments"
lock
install_packages "${PACKAGES[@]}"
[[ -x $ENGINE/usr/sbin/dockerd ]] || unpack
use_engine
docker compose version >&2
"$ENGINE/usr/sbin/dockerd" --version >&2
