#!/usr/bin/env bash
# BLEU-4 and ROUGE of a fine-tuned ChatGLM2-6B on the held-out part of ADGEN, greedy.
#   bash evaluate_finetune_chatglm2-6b.sh [--model_name_or_path FOLDER] [--data_path AdvertiseGen] [any flag of evaluate]
# The folder is what run_finetune_chatglm2-6b.sh or run_ptuning_chatglm2-6b.sh wrote. The last of two equal flags wins.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/launch.sh"
run_module training.evaluate.bleu_rouge \
    --model_name_or_path output/adgen-chatglm2-6b-ft-1e-4 --data_path AdvertiseGen \
    --output_dir output/adgen-chatglm2-6b-evaluation \
    --max_source_length 256 --max_target_length 256 "$@"
