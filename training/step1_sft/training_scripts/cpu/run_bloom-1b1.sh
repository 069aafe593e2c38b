#!/usr/bin/env bash
# Supervised fine-tuning of BLOOM-1B1 on a CPU.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/cpu/bloom-1b1.yaml "$@"
