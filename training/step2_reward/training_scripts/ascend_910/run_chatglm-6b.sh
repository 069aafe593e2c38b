#!/usr/bin/env bash
# Reward model of ChatGLM-6B on one node with 8 Ascend 910 of 32 GB.
#   bash run_chatglm-6b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/ascend_910/chatglm-6b.yaml "$@"
