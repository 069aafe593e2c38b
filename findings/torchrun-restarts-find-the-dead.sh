#!/usr/bin/env bash
# torchrun --max_restarts with a given --master_port: the processes of the second start read the addresses of those of the first from the
# store that torchrun keeps unless the new ones stand there already, and gloo cannot connect: a race, lost about every other time.
# With names of this start's own in the store it can.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/step.py" <<'PY'
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

start, rank, limit = os.environ["TORCHELASTIC_RESTART_COUNT"], int(os.environ["RANK"]), timedelta(seconds=30)
if sys.argv[1] == "own-names":
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=dist.PrefixStore(start, store), rank=rank, world_size=2, timeout=limit)
else:
    dist.init_process_group("gloo", timeout=limit)
dist.all_reduce(torch.ones(1))
os.write(1, f"start {start} of rank {rank} is connected\n".encode())
if start == "0" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
PY
"$folder/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
run() {
  code=0
  "$folder/venv/bin/python" -m torch.distributed.run --nproc_per_node 2 --max_restarts 1 --master_port 29789 "$folder/step.py" "$1" \
    >"$folder/log" 2>&1 || code=$?
  echo "$1: exit code $code"
  grep -E "is connected|connectFullMesh" "$folder/log" | cut -c 1-160
}
for try in {1..12}; do
  run usual
  [[ $code = 1 ]] && break
done
[[ $code = 1 ]] || { echo CHANGED; exit 1; }
for try in 1 2 3; do
  run own-names
  [[ $code = 0 ]] || { echo CHANGED; exit 1; }
done
echo "as found: the restarted processes look for the dead ones"
