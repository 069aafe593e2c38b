#!/usr/bin/env bash
# Reward model, bloom-1b1, one node with 8 Ascend 910 of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/ascend_910/bloom-1b1.yaml "$@"
