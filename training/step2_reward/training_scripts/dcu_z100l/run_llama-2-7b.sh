#!/usr/bin/env bash
# Reward model of Llama-2-7B on one node with 8 Hygon DCU Z100L of 32 GB.
#   bash run_llama-2-7b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/dcu_z100l/llama-2-7b.yaml "$@"
