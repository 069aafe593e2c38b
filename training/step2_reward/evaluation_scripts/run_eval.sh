#!/bin/bash
# Scores of good and bad answers by a reward model.   bash run_eval.sh REWARD_MODEL [any flag of rw_eval]
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash $0 REWARD_MODEL [--data_path …] [--output FILE]" >&2
    exit 2
fi
model=$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/launch.sh"
run_module training.evaluate.reward_scores --model_name_or_path "$model" "$@"
