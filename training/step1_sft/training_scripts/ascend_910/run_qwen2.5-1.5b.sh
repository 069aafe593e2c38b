#!/usr/bin/env bash
# Supervised fine-tuning, qwen2.5-1.5b, one node with 8 Ascend 910 of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/ascend_910/qwen2.5-1.5b.yaml "$@"
