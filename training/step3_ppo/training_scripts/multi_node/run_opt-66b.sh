#!/usr/bin/env bash
# PPO of OPT-66B on two nodes with 8 NVIDIA cards of 80 GB each.
#   bash run_opt-66b.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [--hostfile FILE] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/multi_node/opt-66b.yaml "$@"
