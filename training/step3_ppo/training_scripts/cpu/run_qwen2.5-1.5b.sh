#!/usr/bin/env bash
# PPO of Qwen2.5-1.5B on a CPU.
#   bash run_qwen2.5-1.5b.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/cpu/qwen2.5-1.5b.yaml "$@"
