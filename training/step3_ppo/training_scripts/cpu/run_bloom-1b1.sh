#!/usr/bin/env bash
# PPO, bloom-1b1, one machine without an accelerator: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/cpu/bloom-1b1.yaml "$@"
