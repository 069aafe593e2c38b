#!/usr/bin/env bash
# Reward model, bloom-1b1, one NVIDIA card of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/single_gpu/bloom-1b1.yaml "$@"
