#!/usr/bin/env bash
# Is PAD different from EOS? Prints both tokens before and after the fix in train_vqa.py. Exit status: 0 if they differ
# after the fix and a stop token exists, else 1.
#
#   bash verify_tokenizer.sh [MODEL]    folder or hub id. Default: that of train_vqa.py
set -euo pipefail

case ${1-} in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/train_with_eval_FINAL.sh" --python)
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} "$python" - "$@" <<'PY'
import contextlib, io, sys

from transformers import AutoTokenizer

import train_vqa


def show(when, tokenizer):
    print(f"{when}:")
    print(f"   PAD token: {tokenizer.pad_token!r} (ID: {tokenizer.pad_token_id})")
    print(f"   EOS token: {tokenizer.eos_token!r} (ID: {tokenizer.eos_token_id})")


def main():
    model = sys.argv[1] if len(sys.argv) > 1 else train_vqa.DEFAULT_MODEL
    folder = train_vqa.resolve_model_dir(model, flag_name="MODEL")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        after = train_vqa.load_tokenizer(folder)  # first: it names what cannot be read
    before = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    show("Before", before)
    if before.pad_token_id is None:
        print("❌ ISSUE: there is no PAD token")
    elif before.pad_token_id == before.eos_token_id:
        print(f"❌ ISSUE: PAD and EOS tokens are THE SAME\n   Both have ID: {before.eos_token_id}")
    else:
        print("✅ PAD and EOS tokens are different")
    print()
    print(said.getvalue(), end="")
    show("After load_tokenizer", after)
    stops = train_vqa.stop_token_ids(after)
    print(f"   Generation stops at: {', '.join(f'{after.convert_ids_to_tokens(i)!r} (ID: {i})' for i in stops)}")
    print()
    if after.pad_token_id in (None, after.eos_token_id) or not stops:
        print("❌ ISSUE: PAD and EOS are not apart, or no token ends a turn")
        return 1
    if after.pad_token != before.pad_token:
        print(f"✅ FIX: Updated train_vqa.py adds dedicated {after.pad_token} token")
    return 0


train_vqa.run(main)
PY
