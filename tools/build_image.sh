#!/usr/bin/env bash
# Build the CPU image without a daemon or a registry, and try it: `doctor`, two steps of training.
#   tools/build_image.sh [FOLDER]    a folder for base, layers and scratch (3 GB), removed in the end; default: a temporary one
#   KEEP=image.tar tools/build_image.sh    keep the image; `docker load -i` and `apptainer build x.sif docker-archive:image.tar` read it
# As root, on Debian 12: apt-get install --no-install-recommends buildah mmdebstrap
# The base is made from this machine's own apt sources; pip inside the build uses pip's configuration here, which is mounted for
# the build and not kept in the image.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in buildah mmdebstrap; do
  command -v "$tool" >/dev/null || { echo "error: $tool is not installed: apt-get install --no-install-recommends $tool" >&2; exit 2; }
done

work=$(mktemp -d -p "${1:-${TMPDIR:-/tmp}}" image.XXXXXX)
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
# shellcheck disable=SC2317,SC2329 # called by the trap
clean() { rm -rf "$work"; }
trap clean EXIT
build() { buildah --root "$work/root" --runroot "$work/run" "$@"; }
say() { printf -- '--- %s (after %s s)\n' "$*" "$SECONDS"; }

say "base"
# shellcheck source=/dev/null
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$work/base.tar"
container=$(build from scratch)
build add --quiet "$container" "$work/base.tar" / >/dev/null
rm "$work/base.tar"
build commit --quiet "$container" base >/dev/null
build rm "$container" >/dev/null

say "image"
# pip's settings here, environment included, as a file; and what of this machine they point to
python3 -m pip config list | python3 -c '
import ast, sys
keys = {"cert", "client-cert", "extra-index-url", "find-links", "index-url", "no-index", "proxy", "timeout", "trusted-host"}
found = {}
for line in sys.stdin:
    key, _, value = line.rstrip("\n").partition("=")
    found.setdefault(key.rpartition(".")[2], []).append(ast.literal_eval(value))
print("[global]")
for key, values in found.items():
    if key in keys:
        print(key, "=", " ".join(dict.fromkeys(" ".join(values).split())))
' >"$work/pip.conf"
mounts=()
while read -r path; do
  [ ! -e "$path" ] || mounts+=(--volume "$path:$path:ro")
done < <(grep -oE '(file://)?/[^ ]+' "$work/pip.conf" | sed -n 's,^file://,,; /^\/[^/]/p' | sort -u)
# an index of the form .../simple has links to its neighbours
while read -r path; do
  mounts+=(--volume "$path:$path:ro")
done < <(grep -oE 'file:///[^ ]+/simple' "$work/pip.conf" | sed 's,^file://,,; s,/simple$,,' | sort -u)
build build --quiet --file docker/Dockerfile.cpu --build-arg BASE=localhost/base --secret "id=pip,src=$work/pip.conf" \
  "${mounts[@]}" --tag megatron-scratch:cpu . >/dev/null

say "doctor"
container=$(build from --pull-never megatron-scratch:cpu)
build run "$container" -- megatron-scratch doctor

say "two steps"
build run "$container" -- sh -c 'id -u | grep -qx 1000
  megatron-scratch data prepare corpus.input=stdlib corpus.output=data corpus.tokenizer=byte corpus.max_bytes=200000
  megatron-scratch train data.dir=data name=two train.steps=2 launcher.processes=1'

say "nothing of the build is left in it"
build run "$container" -- sh -c '! test -s /etc/pip.conf && ! test -e /src/.git && ! env | grep -i -E "token|secret|passw"'
if [ -n "${KEEP:-}" ]; then
  build push --quiet megatron-scratch:cpu "docker-archive:$KEEP:megatron-scratch:cpu"
  say "kept as $KEEP"
fi
say "built and tried"
