#!/usr/bin/env bash
# deepspeed --launcher openmpi passes neither --master_addr nor --master_port on: its processes have no address to meet at, and
# init_distributed looks for one with mpi4py, which deepspeed does not require.
# Needs Debian's openmpi-bin.
set -euo pipefail
command -v mpirun >/dev/null || { echo "mpirun is missing: apt-get install openmpi-bin"; exit 1; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 DS_ACCELERATOR=cpu
unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools==84.2.1
venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
mpirun --version | head -n 1
venv/bin/python -c 'from importlib.metadata import version; print("deepspeed", version("deepspeed"))'
echo "localhost slots=2" >hosts
cat >step.py <<'PY'
import os

names = ("OMPI_COMM_WORLD_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT")
print(*(f"{name}={os.environ.get(name)}" for name in names), flush=True)
import deepspeed

deepspeed.init_distributed("gloo")
PY
PATH=$PWD/venv/bin:$PATH venv/bin/python -m deepspeed.launcher.runner --hostfile hosts --force_multi --no_ssh_check --launcher openmpi \
  --launcher_args "--mca btl_tcp_if_include lo --oversubscribe" --master_addr 127.0.0.1 --master_port 29791 step.py >log 2>&1 || true
{ grep -E "^OMPI_COMM_WORLD_RANK" log || true; } | sort
grep -m 1 -E "^ModuleNotFoundError" log || true
if [ "$(grep -c "RANK=None MASTER_ADDR=None MASTER_PORT=None" log)" = 2 ] && grep -q "No module named 'mpi4py'" log; then
  echo "as found: no rank, no address, and a package that is missing"
else
  tail -n 20 log
  echo CHANGED
  exit 1
fi
