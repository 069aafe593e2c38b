#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-7B on one node with 8 NVIDIA cards of 80 GB.
#   bash run_qwen2.5-7b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/single_node/qwen2.5-7b.yaml "$@"
