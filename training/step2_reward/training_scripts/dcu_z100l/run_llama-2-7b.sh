#!/usr/bin/env bash
# Reward model, llama-2-7b, one node with 8 Hygon DCU Z100L of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/dcu_z100l/llama-2-7b.yaml "$@"
