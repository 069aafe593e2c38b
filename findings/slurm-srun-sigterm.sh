#!/usr/bin/env bash
# srun that gets SIGTERM kills the tasks of its step with SIGKILL: they save nothing. A signal to the step reaches them.
# Needs root and Debian's slurm-wlm and munge; starts them in a temporary folder and stops them.
set -euo pipefail
export PATH=$PATH:/usr/sbin
for tool in slurmctld slurmd munged; do command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install slurm-wlm munge"; exit 1; }; done
folder=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait "${pids[@]}" 2>/dev/null; rm -rf "$folder"' EXIT
host=$(hostname -s)
mkdir "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom >"$folder/key" && chmod 600 "$folder/key"
export SLURM_CONF=$folder/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=finding
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=23817
AuthInfo=socket=$folder/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
KillWait=30
NodeName=na NodeHostname=$host NodeAddr=127.0.0.1 Port=23818 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=na Default=YES State=UP
CONF
munged --foreground --force --socket="$folder/munge" --key-file="$folder/key" --log-file="$folder/munge.log" \
  --pid-file="$folder/munge.pid" --seed-file="$folder/seed" 2>/dev/null & pids+=($!)
sleep 1
slurmctld -D -c 2>/dev/null & pids+=($!)
sleep 1
slurmd -D -N na 2>/dev/null & pids+=($!)
for _ in $(seq 60); do [[ $(sinfo --noheader --format=%T 2>/dev/null) = idle ]] && break; sleep 0.5; done
srun --version
cat >"$folder/task.sh" <<'TASK'
trap 'echo got SIGTERM >>"$1"; sleep 3; echo saved >>"$1"; exit 0' TERM
echo ready >"$1"
while true; do sleep 0.1; done
TASK
try() {  # NAME: start a step, run the rest of the words with its srun's pid, print what the task wrote
  srun -n1 --job-name="$1" bash "$folder/task.sh" "$folder/$1" 2>"$folder/$1.err" & local srun=$!
  for _ in $(seq 100); do [[ -s $folder/$1 ]] && break; sleep 0.1; done
  case $1 in
    to-srun) kill -TERM "$srun" ;;
    to-step) scancel --signal=TERM "$(squeue --steps --noheader --format='%i %j' | awk '$2 == "to-step" {print $1}')" ;;
  esac
  wait "$srun" || true
  echo "$1: $(tr '\n' ',' <"$folder/$1") srun: $(head -n 1 "$folder/$1.err")"
}
try to-srun
try to-step
if ! grep -q saved "$folder/to-srun" && grep -q saved "$folder/to-step"; then
  echo "as found: SIGTERM to srun costs the checkpoint, scancel --signal=TERM to the step does not"
else
  echo CHANGED
  exit 1
fi
