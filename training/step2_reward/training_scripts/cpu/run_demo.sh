#!/usr/bin/env bash
# Reward model, demo, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/cpu/demo.yaml "$@"
