#!/usr/bin/env bash
# Trains with the settings of the original project, then evaluates the result by generation.
#
#   bash train_with_eval_FINAL.sh [flags...]        flags are passed to train_vqa.py and override the ones below
#   bash train_with_eval_FINAL.sh --smoke           the same two steps with the tiny model and the fixtures, on the CPU
#   bash train_with_eval_FINAL.sh --python [FILE]   only installs the missing packages (and those of requirements
#                                                   FILE), and prints the Python that has them
#   bash train_with_eval_FINAL.sh --help            this text; all flags: python train_vqa.py --help, once installed
#
# Environment: MODEL TRAIN_DATA EVAL_DATA FRAMES_DIR AUDIO_DIR EVAL_AUDIO_DIR OUTPUT_DIR RESULTS PYTHON
#   NUM_GPUS: on how many GPUs to train and evaluate, by torchrun; 1 if not set
set -euo pipefail
shopt -s inherit_errexit  # or an install that fails inside $(find_python) would pass

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Prints the first interpreter ($PYTHON if set, .venv beside this script, python3) that has every package named in the given
# requirements files; if none has, makes the .venv. Without requirements.txt, reports the missing packages instead.
find_python() {
    local requirements=("$@") listed=() candidate missing
    for file in "${requirements[@]}"; do [ -f "$file" ] && listed+=("$file"); done
    if [ -n "${PYTHON:-}" ] && ! command -v "$PYTHON" >/dev/null; then
        echo "error: PYTHON: $PYTHON: no such program; name a Python, or unset it" >&2
        return 1
    fi
    for candidate in ${PYTHON:+"$PYTHON"} "$here/.venv/bin/python" "${PYTHON:-python3}"; do
        command -v "$candidate" >/dev/null || continue
        missing=$("$candidate" - "${listed[@]}" <<'PY'
import importlib.metadata, re, sys
lines = [line for path in sys.argv[1:] for line in open(path)] or [
    "torch", "transformers", "peft", "accelerate", "pillow", "torchaudio", "av", "tqdm"]
names = [re.split(r"[<>=!~;\[ #]", line.strip())[0] for line in lines]
installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
print(*[name for name in names if name and name.lower() not in installed])
PY
        )
        if [ -z "$missing" ]; then
            if [ "$candidate" != "${PYTHON:-$candidate}" ]; then
                echo "PYTHON: $PYTHON lacks packages; using $candidate" >&2
            fi
            echo "$candidate"
            return
        fi
    done
    if [ ${#listed[@]} -eq 0 ]; then
        echo "error: packages are missing; run: ${PYTHON:-python3} -m pip install $missing" >&2
        return 1
    fi
    make_venv "${listed[@]}" >&2
    echo "$here/.venv/bin/python"
}

make_venv() {
    echo "Installing the packages into $here/.venv (a few minutes)..."
    local arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    if [ -f "$here/tests/constraints.txt" ]; then arguments+=(-c "$here/tests/constraints.txt"); fi
    "${PYTHON:-python3}" -m venv "$here/.venv"
    "$here/.venv/bin/python" -m pip install -qq --disable-pip-version-check "${arguments[@]}"
    # The torchaudio wheel for Linux is a CUDA build. With a CPU-only torch its extension cannot be loaded, and then
    # transformers cannot be imported either. Without that file torchaudio runs in pure Python, which is enough here.
    "$here/.venv/bin/python" - <<'PY'
import importlib.util, pathlib, torch
if torch.version.cuda is None and torch.version.hip is None:
    folder = pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent / "lib"
    for extension in folder.glob("_torchaudio*.so"):
        extension.unlink()
PY
}

# Prints the last value of the flag $1 in the remaining arguments, or the default $2.
flag_value() {
    local flag=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
            "$flag") value=${2-} ;;
            "$flag="*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# Whether the flag $1 is on in the remaining arguments, alone or with a value; the last one counts.
switched_on() {
    local flag=$1 value=False
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$flag") case ${2-} in "" | -*) value=True ;; *) value=$2 ;; esac ;;
            "$flag="*) value=${1#*=} ;;
        esac
        shift
    done
    case ${value,,} in yes | true | t | y | 1) return 0 ;; esac
    return 1
}

# Runs a command, and exits unless it succeeds. SIGTERM, SIGINT and SIGHUP are passed on to the command, once each,
# whether they come to this script or to its process group. The script then ends after the command. Ctrl-Z stops both.
supervise() {
    local child="" signal="" seen name status=0 latest
    for name in TERM INT HUP; do
        # shellcheck disable=SC2064  # the current name is meant
        trap "signal=$name; [ -z \"\$child\" ] || kill -s $name \"\$child\" 2>/dev/null || true" "$name"
    done
    trap '[ -z "$child" ] || kill -s STOP "$child"; kill -s STOP $$' TSTP
    trap '[ -z "$child" ] || kill -s CONT "$child"' CONT
    set -m  # gives the command its own group; otherwise a command in the background ignores SIGINT
    "$@" &
    child=$!
    set +m
    if [ -n "$signal" ]; then kill -s "$signal" "$child" 2>/dev/null || true; fi
    while :; do
        seen=$signal latest=0
        wait "$child" || latest=$?  # ends early when a signal comes
        if [ "$latest" != 127 ]; then status=$latest; fi  # 127: wait has already returned the status
        if [ "$signal" = "$seen" ] && ! kill -0 "$child" 2>/dev/null; then break; fi
    done
    trap - TERM INT HUP TSTP CONT
    if [ -n "$signal" ] && [ "$status" = 0 ]; then status=$((128 + $(kill -l "$signal"))); fi
    if [ "$status" != 0 ]; then exit "$status"; fi
}

# torchrun without its own report: the last line is that of the rank which failed, and the status is its status.
torchrun='
import logging, signal, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
logging.disable(logging.CRITICAL)
stopped = 128 + signal.SIGTERM  # by which torchrun ends the other ranks
try:
    run.main(sys.argv[1:])
except SignalException as stop:
    sys.exit(128 + stop.sigval)
except ChildFailedError as failed:
    ends = {rank: failure.exitcode for rank, failure in failed.failures.items()}
    rank = next((rank for rank, end in ends.items() if end not in (stopped, -signal.SIGTERM)), min(ends))
    if ends[rank] < 0:
        print(f"error: rank {rank} was killed by {signal.Signals(-ends[rank]).name}", file=sys.stderr)
    sys.exit(ends[rank] if ends[rank] > 0 else 128 - ends[rank])
'

for flag in "$@"; do
    case $flag in -h | --help) exec sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;; esac
done

case ${1-} in
    --python)
        find_python "$here/requirements.txt" "${@:2}"
        exit
        ;;
    --smoke)
        shift
        fixtures=$here/tests/fixtures
        if [ ! -d "$fixtures" ]; then
            echo "error: --smoke needs the fixtures in $fixtures; run it in a clone of the project" >&2
            exit 1
        fi
        MODEL=$fixtures/tiny_model
        TRAIN_DATA=$fixtures/smoke.jsonl EVAL_DATA=$fixtures/smoke.jsonl FRAMES_DIR=$fixtures/frames
        AUDIO_DIR=$fixtures/audio EVAL_AUDIO_DIR=$fixtures/audio
        OUTPUT_DIR=checkpoints/smoke RESULTS=results/smoke.jsonl
        # Such a small model learns five answers with a high learning rate, all rows in one batch and no dropout.
        settings=(
            --init random --use_cpu True --seed 1 --max_image_size 112 --max_eval_frames 0
            --per_device_train_batch_size 5 --gradient_accumulation_steps 1 --checkpoint_every_n 0
            --learning_rate 1e-2 --lr_scheduler_type cosine --warmup_steps 5 --max_steps 150
            --logging_steps 5 --save_strategy no --target_train_loss 1e-3
        )
        smoke=1
        ;;
    *)
        settings=(
            --per_device_train_batch_size 1 --gradient_accumulation_steps 4
            --learning_rate 2e-4 --num_train_epochs 20 --bf16 True --logging_steps 5
            --save_strategy epoch --eval_strategy epoch --per_device_eval_batch_size 1 --eval_accumulation_steps 4
            --max_eval_frames 6
        )
        smoke=0
        ;;
esac

# train_vqa.py also accepts --output-dir for --output_dir; the code below reads only the second spelling.
given=()
for flag in "$@"; do
    case $flag in
        --*)
            name=${flag%%=*}
            flag=--$(tr - _ <<<"${name#--}")${flag#"$name"}
            ;;
    esac
    given+=("$flag")
done
if [ "$smoke" = 1 ] && [ "$(flag_value --train_decoder lora ${given[@]+"${given[@]}"})" != full ]; then
    settings+=(--lora_dropout 0)  # an error without adapters
fi

flags=(
    --train_data_path "${TRAIN_DATA:-test_set/in_002-001.jsonl}"
    --eval_data_path "${EVAL_DATA:-test_set/out_002-001.jsonl}"
    --frames_dir "${FRAMES_DIR:-dataset/frames}"
    --audio_dir "${AUDIO_DIR:-audio/in_002-001}"
    --eval_audio_dir "${EVAL_AUDIO_DIR:-audio/out_002-001}"
    --output_dir "${OUTPUT_DIR:-./checkpoints/surgical_vqa_50samples}"
    ${MODEL:+--model_name_or_path "$MODEL"}
    "${settings[@]}" ${given[@]+"${given[@]}"}
)
python=$(find_python "$here/requirements.txt")
gpus=${NUM_GPUS:-1}
case $gpus in *[!0-9]* | 0*) echo "error: NUM_GPUS: $gpus: must be a number from 1 on" >&2 && exit 1 ;; esac
start=("$python")
if [ "$gpus" = 1 ]; then
    :
elif switched_on --dry_run "${flags[@]}"; then
    flags+=(--num_gpus "$gpus")
elif ! switched_on --check_data "${flags[@]}"; then
    start+=(-c "$torchrun" --standalone --nproc_per_node "$gpus")
fi
results=${RESULTS:-results/eval_out.jsonl}
# Before hours of training. Evaluation starts $results anew, so what is there must be of this checkpoint.
output=$(flag_value --output_dir "" "${flags[@]}")
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} "$python" - "$results" "$output" \
    "$(flag_value --train_data_path "" "${flags[@]}")" "$(flag_value --eval_data_path "" "${flags[@]}")" <<'PY'
import argparse, sys
import evaluate_checkpoint as ev
results, checkpoint, train_data, eval_data = sys.argv[1:]
try:
    ev.check_output(argparse.Namespace(output_file=results, train_data_path=train_data, eval_data_path=eval_data))
    ev.check_rows_of(results, checkpoint)
except ev.InputError as error:
    sys.exit("error: " + str(error).replace("--output_file", "RESULTS"))
PY
supervise "${start[@]}" "$here/train_vqa.py" "${flags[@]}"

if switched_on --dry_run "${flags[@]}" || switched_on --check_data "${flags[@]}"; then exit; fi

limit=$(flag_value --gpu_memory_limit_gib "" "${flags[@]}")
features=$(flag_value --cache_features "" "${flags[@]}")
evaluation=(--overwrite)  # rows of an earlier training would be refused
if switched_on --allow_symlinks "${flags[@]}"; then evaluation+=(--allow_symlinks); fi
if switched_on --skip_bad_samples "${flags[@]}"; then
    evaluation+=(--allow_errors)  # rows that training left out count as wrong
else
    evaluation+=(--train_data_path "$(flag_value --train_data_path "" "${flags[@]}")")
fi
supervise "${start[@]}" "$here/evaluate_checkpoint.py" \
    --checkpoint_path "$output" \
    --eval_data_path "$(flag_value --eval_data_path "" "${flags[@]}")" \
    --frames_dir "$(flag_value --frames_dir "" "${flags[@]}")" \
    --audio_dir "$(flag_value --eval_audio_dir "" "${flags[@]}")" \
    --output_file "$results" ${limit:+--gpu_memory_limit_gib "$limit"} ${features:+--cache_features "$features"} "${evaluation[@]}"

if [ "$smoke" = 1 ]; then
    "$python" - "${results%.jsonl}.summary.json" <<'PY'
import json, sys
summary = json.load(open(sys.argv[1]))
total, correct = summary["n_total"], round(summary["metrics"]["contains"]["accuracy"] * summary["n_total"])
stopped = summary["finish"]["eos"]
print(f"smoke: {correct}/{total} correct, {stopped}/{total} stopped by themselves")
sys.exit(not correct == stopped == total == 5)
PY
fi
