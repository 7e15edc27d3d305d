# shellcheck shell=bash disable=SC2034  # what it sets is used by the scripts that read it
# Where the suite's Docker engine is. Messages, the lock, and how programs are started and ended are
# those of tests/cluster, in a folder of this suite's own.
export RDEV_CLUSTER_DIR=${RDEV_E2E_DIR:-$HOME/.cache/rdev-e2e}
# shellcheck source=../cluster/common.sh
. "$HERE/../cluster/common.sh"

ROOT=$(realpath "$HERE/../..")
ENGINE=$CLUSTER_DIR/engine # Debian's packages, unpacked: nothing of them is installed
DATA=$CLUSTER_DIR/data     # layers of images; worth caching
WHEELS=$CLUSTER_DIR/wheels # what requirements/image.txt locks
ROOM_MB=3000               # a first run takes 2 GB for a minute, and 900 MB stay
DEBIAN=localhost/rdev/debian:e2e BASE=localhost/rdev/base:e2e DATABASE=localhost/rdev/postgres:e2e

# The client's side of an engine of our own, and what the engine itself calls (docker-proxy).
use_engine() {
  export PATH=$ENGINE/usr/bin:$ENGINE/usr/sbin:$PATH DOCKER_HOST=unix://$RUN/docker.sock
  export DOCKER_CONFIG=$CLUSTER_DIR/config DOCKER_BUILDKIT=0 # a builder of its own is not in the package
  unset DOCKER_CONTEXT DOCKER_TLS_VERIFY DOCKER_CERT_PATH
}
