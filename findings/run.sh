#!/usr/bin/env bash
# Run one finding, or all:   bash findings/run.sh [NAME]
# Exit code 1 if a library no longer behaves as its finding says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ $# -gt 0 ]; then exec bash "$1.sh"; fi
changed=0
for file in *.sh; do
  [ "$file" = run.sh ] && continue
  echo "== ${file%.sh}"
  bash "$file" || changed=1
done
exit "$changed"
