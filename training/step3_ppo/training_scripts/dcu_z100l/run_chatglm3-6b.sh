#!/usr/bin/env bash
# PPO, chatglm3-6b, one node with 8 Hygon DCU Z100L of 32 GB: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/dcu_z100l/chatglm3-6b.yaml "$@"
