#!/usr/bin/env bash
# Reward model of Llama-2-7B on two nodes with 8 NVIDIA cards of 80 GB each.
#   bash run_llama-2-7b.sh [OUTPUT] [ZERO_STAGE] [--hostfile FILE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/multi_node/llama-2-7b.yaml "$@"
