#!/usr/bin/env bash
# Supervised fine-tuning of Llama-2-7B on one NVIDIA card of 80 GB.
#   bash run_llama-2-7b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/single_gpu/llama-2-7b.yaml "$@"
