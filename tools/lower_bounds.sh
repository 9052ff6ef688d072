#!/usr/bin/env bash
# Installs exactly the lower bounds of pyproject.toml's dependencies into .venv-lower and runs unit and property tests and
# the launcher's own integration tests on them.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-lower
python=${PYTHON:-python3}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$python" - >"$venv/lower.txt" <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["etcd"]:
    print(requirement.split(",")[0].replace(">=", "=="))
PYTHON
cat "$venv/lower.txt"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -c "$venv/lower.txt" \
    -e '.[torch,etcd]' pytest pytest-asyncio hypothesis numpy
"$venv/bin/python" -m pytest -q tests/unit tests/property \
    tests/integration/test_run_job.py tests/integration/test_etcd_store.py tests/integration/test_worker_link.py
