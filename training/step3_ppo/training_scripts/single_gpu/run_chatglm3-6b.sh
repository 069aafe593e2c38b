#!/usr/bin/env bash
# PPO, chatglm3-6b, one NVIDIA card of 80 GB: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/single_gpu/chatglm3-6b.yaml "$@"
