#!/usr/bin/env bash
# Reward model of Llama-2-7B on one node with 8 Ascend 910 of 32 GB.
#   bash run_llama-2-7b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/ascend_910/llama-2-7b.yaml "$@"
