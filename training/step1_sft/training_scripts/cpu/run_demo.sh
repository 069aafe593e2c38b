#!/usr/bin/env bash
# Supervised fine-tuning, demo, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/cpu/demo.yaml "$@"
