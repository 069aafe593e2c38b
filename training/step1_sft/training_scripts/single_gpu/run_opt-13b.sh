#!/usr/bin/env bash
# Supervised fine-tuning of OPT-13B on one NVIDIA card of 80 GB.
#   bash run_opt-13b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/single_gpu/opt-13b.yaml "$@"
