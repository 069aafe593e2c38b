#!/usr/bin/env bash
# Reward model of BLOOM-1B1 on one NVIDIA card of 80 GB.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/single_gpu/bloom-1b1.yaml "$@"
