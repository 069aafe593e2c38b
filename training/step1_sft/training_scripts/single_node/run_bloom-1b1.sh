#!/usr/bin/env bash
# Supervised fine-tuning of BLOOM-1B1 on one node with 8 NVIDIA cards of 80 GB.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/single_node/bloom-1b1.yaml "$@"
