#!/usr/bin/env bash
# Supervised fine-tuning of BLOOM-1B1 on one node with 8 Hygon DCU Z100L of 32 GB.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/dcu_z100l/bloom-1b1.yaml "$@"
