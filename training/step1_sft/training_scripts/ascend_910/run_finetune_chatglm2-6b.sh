#!/usr/bin/env bash
# Supervised fine-tuning, finetune_chatglm2-6b, one node with 8 Ascend 910 of 32 GB: [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step1_sft configs/ascend_910/finetune_chatglm2-6b.yaml "$@"
