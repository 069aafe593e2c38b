#!/usr/bin/env bash
# Reward model, qwen2.5-7b, one node with 8 Hygon DCU Z100L of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/dcu_z100l/qwen2.5-7b.yaml "$@"
