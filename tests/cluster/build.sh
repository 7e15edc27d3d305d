#!/usr/bin/env bash
# Installs the Debian packages that a cluster needs and builds Kubernetes from
# Debian's source package. Does nothing where both are there already.
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

RUN_PACKAGES=(busybox-static containerd containernetworking-plugins debootstrap etcd-server
  iproute2 openssl procps python3 runc)
BUILD_PACKAGES=(dpkg-dev golang-1.19-go)
WORK=$CLUSTER_DIR/build # 2 GB while it runs; a build that was broken off goes on from it
SOURCE=$WORK/go/src/k8s.io/kubernetes

# Source packages are switched off on most machines; lists of our own leave the
# machine's as they are and still follow its other settings (proxy, keys).
get_source() {
  [[ ! -d $SOURCE ]] || return 0
  local mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  mirror=$(debian_mirror)
  rm -rf "$WORK/apt"
  mkdir -p "$WORK"/apt/{lists/partial,cache/archives/partial,download} "${SOURCE%/*}"
  echo "deb-src [signed-by=$keyring] $mirror bookworm main" >"$WORK/apt/sources.list"
  cat >"$WORK/apt/apt.conf" <<APT
Dir::Etc::sourcelist "$WORK/apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$WORK/apt/lists";
Dir::Cache "$WORK/apt/cache";
Acquire::Languages "none";
APT::Sandbox::User "root";
APT
  (
    cd "$WORK/apt/download"
    export APT_CONFIG=$WORK/apt/apt.conf
    apt-get update -qq
    apt-get source -qq --only-source --download-only kubernetes
    dpkg-source --no-check -x kubernetes_*.dsc "$SOURCE.new" >/dev/null # apt has checked the hashes
  )
  mv "$SOURCE.new" "$SOURCE"
  say "source: $(version)"
}

version() { # Debian calls it 1.20.5+really1.20.2-...
  dpkg-parsechangelog --file "$SOURCE/debian/changelog" --show-field Version |
    sed -E 's/.*really//; s/-.*//; s/^/v/'
}

# The API server needs this file, and the package does not have it. The same
# generator with the same input as upstream's Makefile.generated_files.
generate_openapi() {
  local file=pkg/generated/openapi/zz_generated.openapi.go packages
  [[ ! -f $file ]] || return 0
  go build -o "$WORK/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
  packages=$(grep -rl --include='*.go' '+k8s:openapi-gen=' cmd pkg plugin staging/src/k8s.io |
    grep -vE '_test\.go|/testdata/|/code-generator/|/sample-apiserver/|zz_generated' |
    xargs dirname | sort -u | sed 's#^staging/src/#vendor/#; s#^#k8s.io/kubernetes/#' |
    paste -sd,)
  "$WORK/openapi-gen" -i "$packages" -p k8s.io/kubernetes/pkg/generated/openapi \
    -O zz_generated.openapi -h hack/boilerplate/boilerplate.generatego.txt \
    --output-base "$WORK/generated" -r "$WORK/violations"
  sed 's#k8s.io/kubernetes/vendor/##g' "$WORK/generated/k8s.io/kubernetes/$file" >"$file.new"
  mv "$file.new" "$file"
  say 'openapi'
}

# The reflect2 of that time calls a function of the runtime that has had one argument more since Go
# 1.18: iterating over a map as JSON then ends the API server, now and then. As reflect2 1.0.2 does it.
mend_reflect2() {
  local file=vendor/github.com/modern-go/reflect2
  grep -q 'mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer) \*hiter' $file/unsafe_link.go || return 0
  perl -0pi -e 's/(mapiterinit\(rtype unsafe\.Pointer, m unsafe\.Pointer)\) \*hiter/$1, it *hiter)/;
    s/type hiter struct \{.*?\n\}/type hiter struct {\n\tkey, value, t, h, buckets, bptr unsafe.Pointer\n\toverflow, oldoverflow *[]unsafe.Pointer\n\tstartBucket uintptr\n\toffset uint8\n\twrapped bool\n\tB, i uint8\n\tbucket, checkBucket uintptr\n}/s' \
    $file/unsafe_link.go
  perl -0pi -e 's/return &UnsafeMapIterator\{\s*hiter:\s*mapiterinit\(type2\.rtype, (.*?)\),\n/it := new(hiter)\n\tmapiterinit(type2.rtype, $1, it)\n\treturn &UnsafeMapIterator{\n\t\thiter: it,\n/s' \
    $file/unsafe_map.go
  say 'reflect2 mended'
}

build() {
  export PATH=/usr/lib/go-1.19/bin:$PATH GOPATH=$WORK/go GOCACHE=$WORK/cache
  export GO111MODULE=off CGO_ENABLED=0 # everything it needs is in its vendor folder
  unset GOFLAGS GOROOT
  cd "$SOURCE"
  mend_reflect2
  generate_openapi
  local name place flags='-s -w'
  for place in component-base client-go/pkg; do # the latter is what /version says
    place=k8s.io/kubernetes/vendor/k8s.io/$place/version
    flags+=" -X $place.gitVersion=$(version) -X $place.gitMajor=1 -X $place.gitMinor=20"
  done
  for name in "${BINARIES[@]}"; do
    [[ ! -x $BIN/$name ]] || continue
    # Without the code for clouds and for Docker: a third less to build, half the size.
    go build -trimpath -tags providerless,dockerless -ldflags "$flags" -o "$WORK/$name" "./cmd/$name"
    mv "$WORK/$name" "$BIN/$name"
    say "$name: $(stat -c %s "$BIN/$name" | numfmt --to=si)B"
  done
}

built() {
  local name
  for name in "${BINARIES[@]}"; do [[ -x $BIN/$name ]] || return 1; done
}

(($# == 0)) || die "usage: ${0##*/}, without arguments"
lock
[[ $(release) == bookworm ]] ||
  die 'needs Debian 12 (bookworm): later releases have only kubectl of Kubernetes'
command -v kubectl >/dev/null || RUN_PACKAGES+=(kubernetes-client)
install_packages "${RUN_PACKAGES[@]}"
if ! built; then
  install_packages "${BUILD_PACKAGES[@]}"
  mkdir -p "$BIN"
  get_source
  build
  cd /
  rm -rf "$WORK"
fi
say "ready: $BIN"
