#!/usr/bin/env bash
# PPO of Qwen2.5-7B on one NVIDIA card of 80 GB.
#   bash run_qwen2.5-7b.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/single_gpu/qwen2.5-7b.yaml "$@"
