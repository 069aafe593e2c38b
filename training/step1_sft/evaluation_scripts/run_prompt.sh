#!/bin/bash
# Answers before and after step 1, side by side.   bash run_prompt.sh BASELINE FINETUNED [any flag of prompt_eval]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash $0 BASELINE FINETUNED [--language English|Chinese|Japanese] [--data_path …] [--output FILE]" >&2
    exit 2
fi
baseline=$1 finetuned=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/launch.sh"
run_module training.evaluate.side_by_side \
    --model_name_or_path_baseline "$baseline" --model_name_or_path_finetune "$finetuned" "$@"
