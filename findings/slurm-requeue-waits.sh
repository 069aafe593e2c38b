#!/usr/bin/env bash
# A job that goes back to the queue (scontrol requeue) is not eligible for two minutes, on an idle cluster too. Who starts it in the second
# in which it has ended finds out why: slurmd takes the new start for the old one ("Job credential revoked"), and the job has failed.
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
SchedulerParameters=sched_min_interval=1000
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
wait_for() { for _ in $(seq 600); do [[ " $2 " = *" $(scontrol show job "$1" | grep -Po "JobState=\K\w+") "* ]] && return; sleep 0.05; done; }
printf '#!/bin/bash\nsleep 100\n' >"$folder/job.sh"
cd "$folder"
job=$(sbatch --parsable --requeue job.sh)
wait_for "$job" RUNNING
scontrol requeue "$job"
sleep 2
scontrol show job "$job" | grep -E "JobState|EligibleTime"
times=$(scontrol show job "$job" | grep -Eo "(Submit|Eligible)Time=[^ ]+" | cut -d= -f2)
seconds=$(($(date -d "$(tail -n 1 <<<"$times")" +%s) - $(date -d "$(head -n 1 <<<"$times")" +%s)))
echo "seconds from the requeue to the earliest start: $seconds"
scancel "$job"
printf '#!/bin/bash\nsleep "0.$(printf %%09d $((1000000000 - 10#$(date +%%N))))"\nexit 3\n' >"$folder/job.sh"  # at the start of a second
not_met=" (not met in 10 tries)"
for _ in $(seq 10); do  # all must fall into that second, which takes a quiet machine
  job=$(sbatch --parsable --requeue job.sh)
  wait_for "$job" FAILED
  printf '%s\n' "requeue $job" "update JobId=$job StartTime=now" | scontrol >/dev/null
  sleep 3
  if grep "JobId=$job: Job credential revoked" slurmctld.log; then not_met="" && break; fi
  scancel "$job"
done
if ((seconds > 60)); then
  echo "as found: two minutes of waiting; scontrol update StartTime=now ends it, but not at once$not_met"
else
  echo CHANGED
  exit 1
fi
