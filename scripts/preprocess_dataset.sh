#!/usr/bin/env bash
# Tokenise ADGEN (or any data) once into the Arrow cache; training with the same flags then starts at once. No weights are loaded.
#   bash scripts/preprocess_dataset.sh [--model_name_or_path FOLDER] [--data_path …] [--cache_dir …] [any flag of step 1]
# The cache belongs to model, data and lengths: give here what you give to training. The last of two equal flags wins.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
run_module scripts.preprocess_dataset \
    --model_name_or_path THUDM/chatglm2-6b --data_path AdvertiseGen --data_split 1,0,0 \
    --max_source_length 64 --max_target_length 128 "$@"
