#!/usr/bin/env bash
# Supervised fine-tuning of BLOOM-1B1 on one NVIDIA card of 80 GB.
#   bash run_bloom-1b1.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/single_gpu/bloom-1b1.yaml "$@"
