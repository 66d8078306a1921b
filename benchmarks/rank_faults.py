"""What faults do to a training on two ranks, by torchrun on the CPU: each several times, and how often it ended well.

    python benchmarks/rank_faults.py --times 3

It ended well if torchrun was back within a minute of the fault, one line at most was said of it, none by the other
rank, the last finished step (or, where that is lost on one GPU too, the last checkpoint) is complete, and going on from
there ends with the weights of a run that nothing disturbed, bit for bit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_vqa as vqa  # noqa: E402
from tests.conftest import EVALUATION, SIX_STEPS, SMALL, TINY, TRAIN_DATA, same_tensors, weights_of  # noqa: E402

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STEPS = (*SIX_STEPS, *EVALUATION, "--save_steps", "2", "--gradient_accumulation_steps", "1")
# [rank, moment, n, what], as tests/ranks.py has them; the step that is saved; the ranks' statuses.
FAULTS = {
    "SIGTERM to rank 1, at a step": ([1, "training", 5, "TERM"], 5, {143}),
    "SIGINT to both ranks, at a step": ([-1, "training", 5, "INT"], 5, {130}),
    "SIGTERM to torchrun, at a step": ([0, "training", 5, "parent TERM"], 5, {143}),
    "SIGHUP to torchrun, in an evaluation": ([0, "evaluation", 1, "parent HUP"], 3, {129}),
    "SIGTERM to rank 0, in an evaluation": ([0, "evaluation", 1, "TERM"], 3, {143}),
    "SIGTERM to torchrun, in a save": ([1, "saving", 1, "parent TERM"], 2, {143}),
    "SIGINT to rank 1, in a save": ([1, "saving", 1, "INT"], 2, {130}),
    "kill -9 of rank 0": ([0, "training", 4, "KILL"], 2, {-9, 143}),
    "kill -9 of rank 1": ([1, "training", 4, "KILL"], 2, {-9, 143}),
    "kill -9 of rank 1, in a save": ([1, "saving", 2, "KILL"], 2, {-9, 143}),
    "NaN on rank 1": ([1, "training", 4, "nan"], 2, {1, 143}),
    "a damaged frame on rank 1": ([1, "reading", 5, "damage"], 2, {1, 143}),
    "out of memory on rank 1": ([1, "training", 4, "memory"], 3, {1, 143}),
}


def start(folder: Path, *more: str, fault: list | None = None) -> tuple[str, float]:
    """Train into `folder`/out, as far as it comes; what was said, and the seconds it took."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = folder / "frames"
    if not frames.exists():  # which a fault may damage
        subprocess.run(["cp", "-r", ROOT / "tests/fixtures/frames", frames], check=True)
    flags = [*TRAIN_DATA, "--model_name_or_path", str(TINY), "--init", "random", "--seed", "1", *SMALL, *STEPS, *more]
    flags += ["--frames_dir", str(frames), "--output_dir", str(folder / "out")]
    work = folder / "work.json"
    work.write_text(json.dumps({"runs": [flags]} | ({"fault": fault} if fault else {})))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    command = [*TORCHRUN, ROOT / "tests/ranks.py", work]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr, time.monotonic() - began


def judge(folder: Path, undisturbed: Path, fault: list, step: int, statuses: set[int]) -> str:
    """What went otherwise than it should; nothing if all went well."""
    said, _ = start(folder, fault=fault)
    ended = folder / "out"
    seen = {int(status) for status in re.findall(r"exitcode  : (-?\d+)", said)}
    if "parent" not in fault[3] and not seen <= statuses | {-15}:
        return f"statuses {seen}"
    own = said.split("[W")[0].split("Traceback (most")[0] if "torch/distributed" in said else said
    if own.count("error:") + own.count("Stopped by") > 1 or "Traceback" in own:
        return f"said {own!r}"
    complete = [number for number, path in vqa.checkpoints_of(ended).items() if not vqa.find_damage(path)]
    if max(complete, default=0) != step:
        return f"complete are {complete}; {said[-1500:]}"
    if "damage" in fault or "memory" in fault:  # another frame would be trained; other random numbers are drawn
        return ""
    said, _ = start(folder, "--resume_from_checkpoint", "True")
    return "" if same_tensors(weights_of(ended), weights_of(undisturbed / "out")) else f"other weights; {said[-1500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=3, help="How often each fault happens.")
    parser.add_argument("--only", default="", help="Those with this in their names. Empty: all.")
    args = parser.parse_args()
    chosen = {what: fault for what, fault in FAULTS.items() if args.only in what}
    times, failed = args.times, 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        start(root / "undisturbed")
        for number, (what, (fault, step, statuses)) in enumerate(chosen.items()):
            began = time.monotonic()
            found = [judge(root / f"{number}-{n}", root / "undisturbed", fault, step, statuses) for n in range(times)]
            bad = [text for text in found if text]
            failed += len(bad)
            print(
                f"{what}: {times - len(bad)} of {times} ended well, {time.monotonic() - began:.0f} s", *bad, sep="\n  "
            )
            sys.stdout.flush()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
