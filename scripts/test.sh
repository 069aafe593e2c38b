#!/usr/bin/env bash
# Everything that the tests need into .venv, then ruff, then the tests.
#   bash scripts/test.sh [any argument of pytest, such as -k batching or tests/training]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

prepare_venv requirements-test.txt
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest "$@"
