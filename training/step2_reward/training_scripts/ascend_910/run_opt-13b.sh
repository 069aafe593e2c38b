#!/usr/bin/env bash
# Reward model OPT-350M for OPT-13B, on one node with 8 Ascend 910 of 32 GB.
#   bash run_opt-13b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/ascend_910/opt-13b.yaml "$@"
