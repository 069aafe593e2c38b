#!/usr/bin/env bash
# Supervised fine-tuning, bloom-1b1, one node with 8 NVIDIA cards of 80 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/single_node/bloom-1b1.yaml "$@"
