#!/usr/bin/env bash
# DeepSpeed's runner ends with exit code 0 when the launcher that it has started was killed by a signal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools==84.2.1
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
cat >"$folder/step.py" <<'PY'
import os
import signal

os.kill(os.getppid(), signal.SIGKILL)  # as the system does when the memory is full
PY
"$folder/venv/bin/python" -c 'from importlib.metadata import version; print("deepspeed", version("deepspeed"))'
code=0
DS_ACCELERATOR=cpu "$folder/venv/bin/python" -m deepspeed.launcher.runner --hostfile /dev/null --num_gpus 1 --master_port 29787 \
  "$folder/step.py" >"$folder/log" 2>&1 || code=$?
echo "exit code after SIGKILL of the launcher: $code"
if ((code == 0)); then echo "as found: a killed run looks like one that ended well"; else echo CHANGED; tail -n 5 "$folder/log"; exit 1; fi
