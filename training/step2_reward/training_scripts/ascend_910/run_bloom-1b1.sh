#!/usr/bin/env bash
# Reward model of BLOOM-1B1 on one node with 8 Ascend 910 of 32 GB.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/ascend_910/bloom-1b1.yaml "$@"
