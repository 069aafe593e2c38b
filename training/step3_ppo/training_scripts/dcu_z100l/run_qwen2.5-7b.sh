#!/usr/bin/env bash
# PPO of Qwen2.5-7B on one node with 8 Hygon DCU Z100L of 32 GB.
#   bash run_qwen2.5-7b.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/dcu_z100l/qwen2.5-7b.yaml "$@"
