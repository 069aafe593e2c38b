#!/usr/bin/env bash
# PPO, chatglm-6b, two nodes with 8 NVIDIA cards of 80 GB each: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/multi_node/chatglm-6b.yaml "$@"
