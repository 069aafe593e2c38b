#!/usr/bin/env bash
# Supervised fine-tuning, opt-1.3b, one NVIDIA card of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/single_gpu/opt-1.3b.yaml "$@"
