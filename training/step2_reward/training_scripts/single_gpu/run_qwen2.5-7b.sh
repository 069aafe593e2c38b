#!/usr/bin/env bash
# Reward model, qwen2.5-7b, one NVIDIA card of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/single_gpu/qwen2.5-7b.yaml "$@"
