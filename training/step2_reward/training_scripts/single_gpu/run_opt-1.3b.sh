#!/usr/bin/env bash
# Reward model, opt-1.3b, one NVIDIA card of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/single_gpu/opt-1.3b.yaml "$@"
