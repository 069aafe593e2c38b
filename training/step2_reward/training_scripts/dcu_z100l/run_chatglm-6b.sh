#!/usr/bin/env bash
# Reward model of ChatGLM-6B on one node with 8 Hygon DCU Z100L of 32 GB.
#   bash run_chatglm-6b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/dcu_z100l/chatglm-6b.yaml "$@"
