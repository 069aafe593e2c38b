#!/usr/bin/env bash
# Supervised fine-tuning of ChatGLM-6B on one node with 8 Ascend 910 of 32 GB.
#   bash run_chatglm-6b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/ascend_910/chatglm-6b.yaml "$@"
