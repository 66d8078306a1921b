#!/usr/bin/env bash
# ruff and the quick tests; --all adds the slow ones (the smoke run, learning, kills, signals, fuzzing). Other flags go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=(-m "not slow")
if [ "${1-}" = --all ]; then
    selection=()
    shift
fi
python=$(bash train_with_eval_FINAL.sh --python tests/requirements.txt)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "${selection[@]}" "$@"
