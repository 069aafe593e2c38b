#!/usr/bin/env bash
# P-Tuning v2 of ChatGLM2-6B on ADGEN, on one card; the base is frozen in 4 bits (about 7 GB).
#   bash run_ptuning_chatglm2-6b.sh [--model_name_or_path FOLDER] [--data_path AdvertiseGen] [any flag of step 1]
# AdvertiseGen: a folder with train.json and dev.json ({"content", "summary"} a line). The last of two equal flags wins.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/launch.sh"
run_module training.step1_sft.main \
    --model_name_or_path THUDM/chatglm2-6b --data_path AdvertiseGen --data_split 1,0,0 \
    --output_dir output/adgen-chatglm2-6b-pt-128-2e-2 \
    --pre_seq_len 128 --quantization_bit 4 \
    --max_source_length 64 --max_target_length 128 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --gradient_checkpointing \
    --learning_rate 2e-2 --lr_scheduler_type linear --adam_beta2 0.999 \
    --max_steps 3000 --logging_steps 10 --save_steps 1000 "$@"
