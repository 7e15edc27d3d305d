#!/usr/bin/env bash
# Runs tests on a Docker engine: the one that answers, else one of its own, which is unpacked where it
# must be, started, and taken down at the end. Where that cannot be, the tests are told why
# (RDEV_TEST_NO_ENGINE), in words out of the closed list of tests/e2e/stack.py.
# usage: run.sh COMMAND...
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

reason() { # prints why there can be no engine here; nothing where there can
  if [[ $EUID != 0 ]]; then
    echo 'not root'
  elif [[ $(release) != bookworm ]]; then
    echo 'not Debian 12'
  elif ! "$HERE/engine.sh" >&2; then
    echo 'the engine cannot be unpacked'
  elif ! "$HERE/up.sh" >&2; then
    echo 'the engine does not start'
  elif ! "$HERE/base.sh" >&2; then
    echo 'the base image cannot be made'
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
  make --no-print-directory -C "$ROOT" image ENGINE=docker ${RDEV_TEST_DATABASE_IMAGE:+BASE=$BASE} >"$CLUSTER_DIR/image.log" 2>&1 ||
    die "make image: $(tail -n 20 "$CLUSTER_DIR/image.log")"
  export RDEV_TEST_ENGINE=docker
fi
"$@"
