#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-1.5B on one NVIDIA card of 80 GB.
#   bash run_qwen2.5-1.5b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/single_gpu/qwen2.5-1.5b.yaml "$@"
