#!/usr/bin/env bash
# Reward model of Llama-2-7B on one node with 8 NVIDIA cards of 80 GB.
#   bash run_llama-2-7b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/single_node/llama-2-7b.yaml "$@"
