#!/usr/bin/env bash
# Reward model, qwen2.5-7b, two nodes with 8 NVIDIA cards of 80 GB each: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/multi_node/qwen2.5-7b.yaml "$@"
