#!/usr/bin/env bash
# PPO, opt-1.3b, one machine without an accelerator: [ACTOR CRITIC ACTOR_ZERO CRITIC_ZERO OUTPUT] [flags] [--dry-run]
exec bash "$(dirname "$0")/../../../../scripts/launch.sh" step3_ppo configs/cpu/opt-1.3b.yaml "$@"
