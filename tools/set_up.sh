#!/usr/bin/env bash
# Makes the development environment in one folder: tools/set_up.sh DIR
#
# Python packages go into a virtual environment DIR; Debian's etcd, which tests and chaos need because the one in the
# PyPI wheel can corrupt its data when members are killed, is unpacked to DIR/etcd. Nothing else on the machine changes,
# except that a missing python3-venv is installed when this runs as root.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/set_up.sh DIR}
python=${PYTHON:-python3}

say() { echo "set-up: $*"; }
fail() { echo "set-up: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed; set PYTHON="

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    [ "$(id -u)" = 0 ] || fail "python3-venv is missing: apt-get install python3-venv"
    say "installing python3-venv"
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
say "installing Python packages (torch is large: this can take a few minutes)"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,etcd,examples,dev]'

if ! command -v etcd >/dev/null && [ ! -x "$venv/etcd/usr/bin/etcd" ]; then
    if command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
        say "unpacking Debian's etcd-server into $venv/etcd"
        download=$(mktemp -d)
        trap 'rm -rf "$download"' EXIT
        [ "$(id -u)" != 0 ] || apt-get update -qq
        (cd "$download" && apt-get download etcd-server >/dev/null 2>&1) ||
            fail "etcd-server can not be downloaded: run apt-get update as root, or install etcd 3.4.22+ or 3.5.6+ by hand"
        dpkg -x "$download"/etcd-server_*.deb "$venv/etcd"
    else
        fail "no etcd on PATH and no apt-get: install etcd 3.4.22+ or 3.5.6+ by hand"
    fi
fi
say "ready"
