#!/usr/bin/env bash
# torchrun ends with 1 whatever its processes end with: 75 (try again) of one of them, and 143 of all after SIGTERM, with a traceback.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/step.py" <<'PY'
import signal
import sys
import time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open(sys.argv[1], "w").write("ready")
if sys.argv[2] == "fails":
    sys.exit(75)
time.sleep(60)
PY
"$folder/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
codes=()
for way in fails waits; do
  "$folder/venv/bin/python" -m torch.distributed.run --nproc_per_node 1 --master_port 29788 "$folder/step.py" "$folder/$way" $way \
    >"$folder/log-$way" 2>&1 & pid=$!
  if [[ $way = waits ]]; then
    for _ in $(seq 300); do [[ -s $folder/$way ]] && break; sleep 0.2; done
    kill -TERM "$pid"
  fi
  code=0; wait "$pid" || code=$?
  codes+=("$code")
done
echo "exit code of torchrun: ${codes[0]} for a process that ended with 75, ${codes[1]} after SIGTERM, on which its process ends with 143"
tail -n 1 "$folder/log-waits"
if [[ ${codes[*]} = "1 1" ]]; then echo "as found: a scheduler cannot tell them apart"; else echo CHANGED; exit 1; fi
