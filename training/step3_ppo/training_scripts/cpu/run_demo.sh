#!/usr/bin/env bash
# PPO, demo, one machine without an accelerator: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/cpu/demo.yaml "$@"
