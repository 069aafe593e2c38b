#!/usr/bin/env bash
# Supervised fine-tuning, qwen2.5-1.5b, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/cpu/qwen2.5-1.5b.yaml "$@"
