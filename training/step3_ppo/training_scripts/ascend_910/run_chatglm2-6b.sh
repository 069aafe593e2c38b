#!/usr/bin/env bash
# PPO of ChatGLM2-6B on one node with 8 Ascend 910 of 32 GB.
#   bash run_chatglm2-6b.sh [ACTOR] [CRITIC] [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags of step 3] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/../../../../scripts/launch.sh"
launch step3_ppo configs/ascend_910/chatglm2-6b.yaml "$@"
