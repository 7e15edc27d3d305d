#!/usr/bin/env bash
# Makes what a registry would have: the base of deploy/Containerfile (Debian with Python 3.13, and the
# locked packages, so that a build needs no network) and a PostgreSQL, both of one debootstrap.
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

RELEASE=trixie # Python 3.13, PostgreSQL 17
INCLUDE=ca-certificates,git,postgresql,python3,python3-pip

make_debian() {
  local rootfs=$CLUSTER_DIR/rootfs archive=$CLUSTER_DIR/debian.tar
  rm -rf --one-file-system "$rootfs"
  # In a mount namespace of its own, so that no mount stays when it is broken off.
  unshare --mount debootstrap --variant=minbase --include="$INCLUDE" \
    "$RELEASE" "$rootfs" "$(debian_mirror)" >"$LOGS/debootstrap.log" 2>&1 ||
    die "debootstrap: $(tail -n 3 "$LOGS/debootstrap.log")"
  rm -rf "$rootfs"/usr/share/{doc,locale,man}/* "$rootfs"/var/lib/apt/lists/* "$rootfs"/var/cache/apt/archives/*.deb
  ln -s python3 "$rootfs/usr/bin/python"
  python3 "$HERE/../cluster/mkimage.py" "$rootfs" "$DEBIAN" "$archive" sleep infinity
  docker load --quiet --input "$archive" >&2
  rm -rf --one-file-system "$rootfs" "$archive"
  say "made $DEBIAN"
}

# By the base's own Python, which is what the lock's conditions are about; by way of this machine: its
# network, its certificates, its index.
get_wheels() {
  local lock=$ROOT/requirements/image.txt index
  ! cmp --silent "$lock" "$WHEELS/image.txt" || return 0
  rm -rf "$WHEELS"
  mkdir -p "$WHEELS/wheels"
  index=${PIP_INDEX_URL:-$(python3 -m pip config get global.index-url 2>/dev/null || true)}
  docker run --rm --network host --volume /etc/ssl/certs:/etc/ssl/certs:ro --volume "$lock:/image.txt:ro" \
    --volume "$WHEELS/wheels:/wheels" ${index:+--env PIP_INDEX_URL="$index"} "$DEBIAN" \
    python -m pip download --quiet --disable-pip-version-check --no-deps \
    --require-hashes --only-binary :all: --dest /wheels --requirement /image.txt >&2
  cp "$lock" "$WHEELS/image.txt"
  say "$(find "$WHEELS/wheels" -type f | wc -l) packages"
}

build() { # IMAGE FOLDER: its Containerfile comes on stdin
  docker build --quiet --tag "$1" --file - "$2" >/dev/null
}

(($# == 0)) || die "usage: ${0##*/}, without arguments"
lock
use_engine
mkdir -p "$LOGS"
docker image inspect "$DEBIAN" >/dev/null 2>&1 || make_debian
get_wheels
build "$BASE" "$WHEELS" <<FILE
FROM $DEBIAN
COPY wheels /opt/wheels
RUN printf '[global]\nno-index = true\nfind-links = /opt/wheels\n' >/etc/pip.conf
FILE
build "$DATABASE" "$HERE" <<FILE
FROM $DEBIAN
COPY database.sh /usr/local/bin/
ENV PATH=/usr/lib/postgresql/17/bin:/usr/sbin:/usr/bin
USER postgres
STOPSIGNAL SIGINT
ENTRYPOINT ["bash", "/usr/local/bin/database.sh"]
FILE
say "ready: $BASE, $DATABASE"
