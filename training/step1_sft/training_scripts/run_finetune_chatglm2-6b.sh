#!/usr/bin/env bash
# All weights of ChatGLM2-6B on ADGEN, ZeRO stage 2 over all visible cards (four in the published run).
#   bash run_finetune_chatglm2-6b.sh [--model_name_or_path FOLDER] [--data_path AdvertiseGen] [any flag of step 1]
# AdvertiseGen: a folder with train.json and dev.json ({"content", "summary"} a line). The last of two equal flags wins.
# NUM_GPUS=2 takes fewer cards, MASTER_PORT another port; without a card: DS_ACCELERATOR=cpu NUM_GPUS=1 … --dtype fp32.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/launch.sh"
run_module deepspeed.launcher.runner \
    ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} --master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}" \
    --module training.step1_sft.main \
    --model_name_or_path THUDM/chatglm2-6b --data_path AdvertiseGen --data_split 1,0,0 \
    --output_dir output/adgen-chatglm2-6b-ft-1e-4 \
    --max_source_length 64 --max_target_length 64 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --gradient_checkpointing \
    --learning_rate 1e-4 --lr_scheduler_type linear --adam_beta2 0.999 \
    --max_steps 5000 --logging_steps 10 --save_steps 1000 --zero_stage 2 --dtype fp16 "$@"
