#!/usr/bin/env bash
# Reward model, chatglm-6b, one node with 8 Ascend 910 of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/ascend_910/chatglm-6b.yaml "$@"
