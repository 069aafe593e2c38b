#!/usr/bin/env bash
# Reward model, opt-13b, one node with 8 NVIDIA cards of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/single_node/opt-13b.yaml "$@"
