#!/usr/bin/env bash
# PPO, chatglm2-6b, one node with 8 Hygon DCU Z100L of 32 GB: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/dcu_z100l/chatglm2-6b.yaml "$@"
