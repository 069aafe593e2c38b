#!/usr/bin/env bash
# Supervised fine-tuning, opt-13b, one NVIDIA card of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/single_gpu/opt-13b.yaml "$@"
