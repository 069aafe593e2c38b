#!/usr/bin/env bash
# Reward model of ChatGLM3-6B on one node with 8 NVIDIA cards of 80 GB.
#   bash run_chatglm3-6b.sh [OUTPUT] [ZERO_STAGE] [flags of step 2] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step2_reward configs/single_node/chatglm3-6b.yaml "$@"
