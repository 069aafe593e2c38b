#!/usr/bin/env bash
# Reward model of Qwen2.5-7B on two nodes with 8 NVIDIA cards of 80 GB each.
#   bash run_qwen2.5-7b.sh [OUTPUT] [ZERO_STAGE] [--hostfile FILE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/multi_node/qwen2.5-7b.yaml "$@"
