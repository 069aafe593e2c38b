#!/usr/bin/env bash
# PPO of BLOOM-1B1 on one NVIDIA card of 80 GB.
#   bash run_bloom-1b1.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/single_gpu/bloom-1b1.yaml "$@"
