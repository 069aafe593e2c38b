#!/usr/bin/env bash
# Supervised fine-tuning of ChatGLM2-6B on one NVIDIA card of 80 GB.
#   bash run_chatglm2-6b.sh [OUTPUT] [ZERO_STAGE] [flags of step 1] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step1_sft configs/single_gpu/chatglm2-6b.yaml "$@"
