#!/usr/bin/env bash
# Reward model, opt-1.3b, one machine without an accelerator: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/cpu/opt-1.3b.yaml "$@"
