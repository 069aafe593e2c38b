#!/usr/bin/env bash
# PPO, qwen2.5-1.5b, one node with 8 Ascend 910 of 32 GB: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/ascend_910/qwen2.5-1.5b.yaml "$@"
