#!/usr/bin/env bash
# Reward model, llama-2-7b, one NVIDIA card of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step2_reward configs/single_gpu/llama-2-7b.yaml "$@"
