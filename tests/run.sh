#!/usr/bin/env bash
# ruff and the quick tests; --all adds the slow ones (the smoke run, learning, kills, fuzzing, benchmarks), in two halves
# side by side. Other flags go to pytest, which then runs once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all=no
if [ "${1-}" = --all ]; then
    all=yes
    shift
fi
python=$(bash train_with_eval_FINAL.sh --python tests/requirements.txt)
"$python" -m ruff check .
"$python" -m ruff format --check .
if [ $all = no ]; then
    exec "$python" -m pytest -m "not slow" "$@"
elif [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi

# One core each. What the first half prints is shown as it comes, what the second prints when both have ended.
half=(tests/test_{faults,evaluation_faults,end_to_end,learning}.py)
log=$(mktemp)
trap 'rm -f "$log"; kill "$other" 2>/dev/null || true' EXIT
"$python" -m pytest -p no:cacheprovider "${half[@]}" >"$log" 2>&1 &
other=$!
status=0
"$python" -m pytest "${half[@]/#/--ignore=}" || status=$?
wait "$other" || status=$?
cat "$log"
exit $status
