#!/bin/sh
# Regenerates the Python modules of every .proto in the tree, or with --check says whether they are current.
#
# Generated code refuses a protobuf older than its generator, so the generator is the oldest one we support
# (grpcio-tools 1.71.0, protobuf 5.29), kept in a virtual environment of its own: .venv-proto.
set -eu
cd "$(dirname "$0")/.."

GENERATOR="grpcio-tools==1.71.0"
VENV=.venv-proto
STAMP="$VENV/$GENERATOR.installed"

mode=write
case "${1:-}" in
"") ;;
--check) mode=check ;;
*)
    echo "usage: tools/gen_proto.sh [--check]" >&2
    exit 2
    ;;
esac

if [ ! -e "$STAMP" ]; then
    rm -rf "$VENV"
    python3 -m venv "$VENV"
    "$VENV/bin/pip" install --quiet "$GENERATOR"
    touch "$STAMP"
fi

# The path given to the compiler mirrors the Python package, so the generated imports are absolute.
protos=$(find -L src/elastic_run -name '*.proto' | LC_ALL=C sort)
if [ "$mode" = write ]; then
    # shellcheck disable=SC2086  # one word per file: no path of the tree holds a blank
    "$VENV/bin/python" -m grpc_tools.protoc -I src --python_out=src --pyi_out=src $protos
    exit 0
fi

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
# shellcheck disable=SC2086
"$VENV/bin/python" -m grpc_tools.protoc -I src --python_out="$fresh" --pyi_out="$fresh" $protos
stale=0
for proto in $protos; do
    base=${proto#src/}
    base=${base%.proto}
    for made in "${base}_pb2.py" "${base}_pb2.pyi"; do
        if ! cmp -s "src/$made" "$fresh/$made"; then
            echo "stale: src/$made (run tools/gen_proto.sh)" >&2
            stale=1
        fi
    done
done
exit "$stale"
