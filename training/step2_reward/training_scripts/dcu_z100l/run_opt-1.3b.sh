#!/usr/bin/env bash
# Reward model OPT-350M for OPT-1.3B, on one node with 8 Hygon DCU Z100L of 32 GB.
#   bash run_opt-1.3b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/dcu_z100l/opt-1.3b.yaml "$@"
