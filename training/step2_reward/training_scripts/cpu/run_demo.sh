#!/usr/bin/env bash
# Reward model of the demo model on a CPU.
#   bash run_demo.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/cpu/demo.yaml "$@"
