#!/usr/bin/env bash
# Reward model of BLOOM-1B1 on one node with 8 NVIDIA cards of 80 GB.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/single_node/bloom-1b1.yaml "$@"
