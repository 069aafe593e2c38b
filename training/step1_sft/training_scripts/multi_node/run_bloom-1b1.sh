#!/usr/bin/env bash
# Supervised fine-tuning of BLOOM-1B1 on two nodes with 8 NVIDIA cards of 80 GB each.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [--hostfile FILE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/multi_node/bloom-1b1.yaml "$@"
