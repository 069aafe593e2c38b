#!/usr/bin/env bash
# mpirun that gets SIGTERM passes it on, and sends SIGKILL one second later, however long a process needs to save. SIGUSR1 it passes on.
# Needs Debian's openmpi-bin.
set -euo pipefail
command -v mpirun >/dev/null || { echo "mpirun is missing: apt-get install openmpi-bin"; exit 1; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mpirun --version | head -n 1
cat >"$folder/task.py" <<'PY'
import signal
import sys
import time


def save(number, _):
    print("got", signal.Signals(number).name, file=out, flush=True)
    time.sleep(4)
    print("saved", file=out, flush=True)
    sys.exit(0)


out = open(sys.argv[1], "w")
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
print("ready", file=out, flush=True)
time.sleep(60)
PY
for name in TERM USR1; do
  mpirun -np 1 python3 "$folder/task.py" "$folder/$name" >"$folder/log" 2>&1 & pid=$!
  for _ in $(seq 100); do [[ -s $folder/$name ]] && break; sleep 0.1; done
  kill -s "$name" "$pid"
  wait "$pid" || true
  echo "SIG$name: $(tr '\n' ',' <"$folder/$name")"
done
if ! grep -q saved "$folder/TERM" && grep -q saved "$folder/USR1"; then
  echo "as found: one second between SIGTERM and SIGKILL (odls_base_sigkill_timeout); SIGUSR1 leaves the time that is needed"
else
  echo CHANGED
  exit 1
fi
