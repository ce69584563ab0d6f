#!/usr/bin/env bash
# Lint and tests, on a machine with Python 3.10+ and bash: makes .venv if it is missing. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal "$@" # one process per core with one thread: more threads would slow each other
