#!/usr/bin/env bash
# PPO of Qwen2.5-1.5B on one node with 8 NVIDIA cards of 80 GB.
#   bash run_qwen2.5-1.5b.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/single_node/qwen2.5-1.5b.yaml "$@"
