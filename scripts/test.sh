#!/usr/bin/env bash
# Everything that the tests need into .venv, then ruff, then the tests.
#   bash scripts/test.sh [any argument of pytest, such as -k batching or tests/training]
# Two files of tests run at a time, each with one thread; -n 0 runs one after the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ "${1-}" == --help ]]; then
    sed -n '2,4s/^# //p' scripts/test.sh && exit
fi
source scripts/venv.sh

prepare_venv requirements-test.txt
.venv/bin/python -m ruff check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE   # rewriting the assertions of all tests takes each of the two 5 s, once
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
