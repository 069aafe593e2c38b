#!/usr/bin/env bash
# Supervised fine-tuning, opt-1.3b, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/cpu/opt-1.3b.yaml "$@"
