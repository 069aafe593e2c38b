#!/usr/bin/env bash
# Reward model, chatglm2-6b, one node with 8 Hygon DCU Z100L of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/dcu_z100l/chatglm2-6b.yaml "$@"
