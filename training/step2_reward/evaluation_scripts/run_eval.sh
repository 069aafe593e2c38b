#!/bin/bash
# Scores of good and bad answers by a reward model.   bash run_eval.sh REWARD_MODEL [any flag of rw_eval]
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash $0 REWARD_MODEL [--data_path …] [--output FILE]" >&2
    exit 2
fi
model=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m training.step2_reward.rw_eval --model_name_or_path "$model" "$@"
