#!/usr/bin/env bash
# PPO of OPT-1.3B on one node with 8 Hygon DCU Z100L of 32 GB.
#   bash run_opt-1.3b.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/dcu_z100l/opt-1.3b.yaml "$@"
