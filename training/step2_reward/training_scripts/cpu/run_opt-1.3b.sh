#!/usr/bin/env bash
# Reward model OPT-350M for OPT-1.3B, on a CPU.
#   bash run_opt-1.3b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/cpu/opt-1.3b.yaml "$@"
