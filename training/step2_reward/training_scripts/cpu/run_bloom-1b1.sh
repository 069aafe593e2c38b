#!/usr/bin/env bash
# Reward model, bloom-1b1, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/cpu/bloom-1b1.yaml "$@"
