#!/usr/bin/env bash
# Supervised fine-tuning of the demo model on a CPU.
# First make what it starts from: python -m scripts.demo_model output/demo/base
#   bash run_demo.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/cpu/demo.yaml "$@"
