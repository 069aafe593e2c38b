#!/usr/bin/env bash
# BLEU-4 and ROUGE of a fine-tuned ChatGLM2-6B on the held-out part of ADGEN, greedy.
#   bash evaluate_finetune_chatglm2-6b.sh [--model_name_or_path FOLDER] [--data_path AdvertiseGen] [any flag of evaluate]
# The folder is what run_finetune_chatglm2-6b.sh or run_ptuning_chatglm2-6b.sh wrote. The last of two equal flags wins.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}") model=output/adgen-chatglm2-6b-ft-1e-4
source "$here/../../../scripts/launch.sh"
if [[ " $* " != *" --model"* && " $* " != *" --path"* && " $* " != *" --help"* && ! -d $model ]]; then
    echo "error: $model is not there; train first with bash $here/../training_scripts/run_finetune_chatglm2-6b.sh," \
        "or name another folder with --model_name_or_path." >&2
    exit 2
fi
run_module scripts.evaluate --model_name_or_path "$model" --data_path AdvertiseGen \
    --output_dir output/adgen-chatglm2-6b-evaluation \
    --max_source_length 256 --max_target_length 256 "$@"
