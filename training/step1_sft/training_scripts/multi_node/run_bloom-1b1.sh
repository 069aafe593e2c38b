#!/usr/bin/env bash
# Supervised fine-tuning, bloom-1b1, two nodes with 8 NVIDIA cards of 80 GB each: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/multi_node/bloom-1b1.yaml "$@"
