#!/usr/bin/env bash
# The main job at full size within the memory of a 40 GB card: 20 training steps at 8 frames with an evaluation of 10
# questions at 6 frames, a save, 5 more steps from it with an evaluation at 8 frames, then answers to 50 questions.
#
#   TRAIN_DATA=... EVAL_DATA=... FRAMES_DIR=... AUDIO_DIR=... EVAL_AUDIO_DIR=... bash benchmarks/full_size.sh [OUTPUT]
#
# MODEL is a folder with config and tokenizer (tests/fixtures/full_size_model); the weights are random.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=${1:-checkpoints/full_size}
python=$(bash "$here/train_with_eval_FINAL.sh" --python)

train=(
    "$python" "$here/train_vqa.py"
    --init random --model_name_or_path "${MODEL:-$here/tests/fixtures/full_size_model}"
    --train_data_path "$TRAIN_DATA" --frames_dir "$FRAMES_DIR" --audio_dir "$AUDIO_DIR"
    --eval_data_path "$EVAL_DATA" --eval_audio_dir "$EVAL_AUDIO_DIR" --max_eval_samples 10
    --output_dir "$output" --per_device_train_batch_size 1 --gradient_accumulation_steps 4
    --per_device_eval_batch_size 1 --eval_accumulation_steps 4 --learning_rate 2e-4 --bf16 True --logging_steps 5
    --gpu_memory_limit_gib 38.5 --report_to none --disable_tqdm True
)
set -x
"${train[@]}" --max_steps 20 --max_eval_frames 6 --eval_strategy steps --eval_steps 20 --save_strategy steps --save_steps 20
"${train[@]}" --max_steps 25 --max_eval_frames 0 --eval_strategy steps --eval_steps 25 --save_strategy no \
    --resume_from_checkpoint "$output/checkpoint-20"
"$python" "$here/evaluate_checkpoint.py" --checkpoint_path "$output" --eval_data_path "$EVAL_DATA" \
    --frames_dir "$FRAMES_DIR" --audio_dir "$EVAL_AUDIO_DIR" --output_file "$output/answers.jsonl" --overwrite \
    --gpu_memory_limit_gib 38.5
