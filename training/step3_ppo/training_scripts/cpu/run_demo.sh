#!/usr/bin/env bash
# PPO of the demo model on a CPU.
#   bash run_demo.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/cpu/demo.yaml "$@"
