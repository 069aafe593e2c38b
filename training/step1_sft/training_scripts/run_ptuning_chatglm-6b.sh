#!/usr/bin/env bash
# P-Tuning v2 of ChatGLM-6B on ADGEN, on one card: as of ChatGLM2-6B, but for the length of answers.
#   bash run_ptuning_chatglm-6b.sh [--model_name_or_path FOLDER] [--data_path AdvertiseGen] [any flag of step 1]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_ptuning_chatglm2-6b.sh" \
    --model_name_or_path THUDM/chatglm-6b --output_dir output/adgen-chatglm-6b-pt-128-2e-2 \
    --max_target_length 64 "$@"
