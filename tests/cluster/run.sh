#!/usr/bin/env bash
# Runs tests on a real cluster: the one that RDEV_TEST_KUBECONFIG names, else one of its own, which is
# built where it must be, brought up, and taken down at the end. Where that cannot be, the tests run
# without one and are told why (RDEV_TEST_NO_CLUSTER), in words out of a closed list.
# usage: run.sh COMMAND...
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

reason() { # prints why there can be no cluster here; nothing where there can
  if [[ $EUID != 0 ]]; then
    echo 'not root'
  elif [[ $(release) != bookworm ]]; then
    echo 'not Debian 12'
  elif [[ $(uname -m) != x86_64 ]]; then
    echo 'not amd64'
  elif ! "$HERE/build.sh" >&2; then
    echo 'the cluster cannot be built'
  elif ! "$HERE/image.sh" >&2; then
    echo 'the images cannot be made'
  elif ! "$HERE/up.sh" >/dev/null; then
    echo 'the cluster does not come up'
  fi
}

(($#)) || die "usage: ${0##*/} COMMAND..."
if [[ -z ${RDEV_TEST_KUBECONFIG:-} ]]; then
  why=$(reason)
  if [[ -n $why ]]; then
    say "without a real cluster: $why"
    export RDEV_TEST_NO_CLUSTER=$why
  else
    trap '"$HERE/down.sh"' EXIT
    export RDEV_TEST_KUBECONFIG=$RDEV_CONFIG RDEV_TEST_ADMIN_KUBECONFIG=$ADMIN_CONFIG
  fi
fi
"$@"
