#!/usr/bin/env bash
# Supervised fine-tuning, opt-6.7b, two nodes with 8 NVIDIA cards of 80 GB each: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/multi_node/opt-6.7b.yaml "$@"
