#!/usr/bin/env bash
# Supervised fine-tuning, chatglm3-6b, one node with 8 NVIDIA cards of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/single_node/chatglm3-6b.yaml "$@"
