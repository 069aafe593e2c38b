#!/usr/bin/env bash
# Supervised fine-tuning, llama-2-7b, one NVIDIA card of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/single_gpu/llama-2-7b.yaml "$@"
