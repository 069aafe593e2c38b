#!/usr/bin/env bash
# Reward model, bloom-1b1, one node with 8 Hygon DCU Z100L of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/dcu_z100l/bloom-1b1.yaml "$@"
