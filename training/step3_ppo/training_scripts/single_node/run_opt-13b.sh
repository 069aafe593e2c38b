#!/usr/bin/env bash
# PPO, opt-13b, one node with 8 NVIDIA cards of 80 GB: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/single_node/opt-13b.yaml "$@"
