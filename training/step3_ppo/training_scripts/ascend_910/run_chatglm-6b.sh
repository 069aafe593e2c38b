#!/usr/bin/env bash
# PPO, chatglm-6b, one node with 8 Ascend 910 of 32 GB: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/ascend_910/chatglm-6b.yaml "$@"
