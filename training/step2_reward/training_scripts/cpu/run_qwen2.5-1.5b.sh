#!/usr/bin/env bash
# Reward model, qwen2.5-1.5b, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/cpu/qwen2.5-1.5b.yaml "$@"
