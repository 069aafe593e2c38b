#!/usr/bin/env bash
# Reward model OPT-350M for OPT-6.7B, on two nodes with 8 NVIDIA cards of 80 GB each.
#   bash run_opt-6.7b.sh [OUTPUT] [ZERO_STAGE] [--hostfile FILE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/multi_node/opt-6.7b.yaml "$@"
