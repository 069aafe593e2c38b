#!/usr/bin/env bash
# Supervised fine-tuning, opt-13b, one node with 8 Hygon DCU Z100L of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/dcu_z100l/opt-13b.yaml "$@"
