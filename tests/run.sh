#!/usr/bin/env bash
# ruff and the quick tests; --all adds the slow ones (the smoke run, learning, kills, fuzzing, benchmarks). The files are
# run in two halves side by side, one core each; with other flags, which go to pytest, in one.
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
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "${selection[@]}" "$@"
fi

# One half is shown as it goes, the other, which is the shorter one, when both have ended.
half=(tests/test_{distributed,faults,evaluation_faults,end_to_end,app,report,main,early_stopping,fsdp,speed}.py)
log=$(mktemp)
"$python" -m pytest -p no:cacheprovider "${selection[@]}" "${half[@]}" >"$log" 2>&1 &
other=$!
trap 'rm -f "$log"; kill "$other" 2>/dev/null || true' EXIT
status=0
"$python" -m pytest "${selection[@]}" "${half[@]/#/--ignore=}" || status=$?
wait "$other" || status=$?
cat "$log"
exit $status
