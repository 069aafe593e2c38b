#!/usr/bin/env bash
# Supervised fine-tuning, qwen2.5-1.5b, one node with 8 NVIDIA cards of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/single_node/qwen2.5-1.5b.yaml "$@"
