#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-1.5B on one node with 8 Ascend 910 of 32 GB.
#   bash run_qwen2.5-1.5b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/ascend_910/qwen2.5-1.5b.yaml "$@"
