#!/usr/bin/env bash
# Supervised fine-tuning of OPT-6.7B on one node with 8 Hygon DCU Z100L of 32 GB.
#   bash run_opt-6.7b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/dcu_z100l/opt-6.7b.yaml "$@"
