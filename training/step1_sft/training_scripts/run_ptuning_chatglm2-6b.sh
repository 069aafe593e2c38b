#!/usr/bin/env bash
# single_gpu/run_ptuning_chatglm2-6b.sh under its former path; on Ascend that of ascend_910/. Without a card: DS_ACCELERATOR=cpu.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/launch.sh"
launch_here step1_sft single_gpu ptuning_chatglm2-6b "$@"
