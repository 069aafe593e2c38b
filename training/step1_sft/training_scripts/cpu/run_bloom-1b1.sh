#!/usr/bin/env bash
# Supervised fine-tuning, bloom-1b1, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/cpu/bloom-1b1.yaml "$@"
