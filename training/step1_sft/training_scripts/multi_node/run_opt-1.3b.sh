#!/usr/bin/env bash
# Supervised fine-tuning of OPT-1.3B on two nodes with 8 NVIDIA cards of 80 GB each.
#   bash run_opt-1.3b.sh [OUTPUT] [ZERO_STAGE] [--hostfile FILE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/multi_node/opt-1.3b.yaml "$@"
