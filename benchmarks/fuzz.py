"""Give damaged and invented content to every function that reads a file, for a given CPU time per reader.

    python benchmarks/fuzz.py --seconds 600 --reader all --jobs 4 --json fuzz.json

Each reader runs in its own process, which counts its CPU seconds. A reader may refuse an input (VQAError or InputError
with a text that names the file). Any other exception, a death by a signal, or 60 seconds on one input is a crash. The
shortest input that crashes a reader is printed, and that reader ends. Exit status: 0 without a crash, else 1.
"""

import argparse
import base64
import contextlib
import copy
import functools
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import evaluate_checkpoint as ev  # noqa: E402
import train_vqa as vqa  # noqa: E402
from tests import test_media  # noqa: E402

FIXTURES = ROOT / "tests/fixtures"
TINY = FIXTURES / "tiny_model"
ROWS = (FIXTURES / "smoke.jsonl").read_bytes()
ROW = ROWS.splitlines()[0]
KINDS = (".jpg", ".png", ".webp", *vqa.AUDIO_EXTENSIONS)
LONGEST = 60  # seconds for one input

EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([]) | st.just({}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.lists(st.tuples(st.integers(0, 10_000), JSON, st.booleans()), min_size=1, max_size=4)


def edited(content: bytes, edits: list) -> bytes:
    """`content` with some bytes replaced, added or removed; half of the edits near the start, where headers are."""
    for where, put, cut in edits:
        at = int(where * 2 * len(content)) if where < 0.5 else int((where - 0.5) * 400)
        content = content[:at] + put + content[at + cut :]
    return content


def changed(stored: dict, changes: list) -> bytes:
    """`stored` as JSON, with some of its values, at any depth, replaced or removed."""
    stored = copy.deepcopy(stored)
    for which, value, leave_out in changes:
        places, todo = [], [stored]
        while todo:
            part = todo.pop()
            for key in part if isinstance(part, dict) else range(len(part)):
                places.append((part, key))
                if isinstance(part[key], dict | list):
                    todo.append(part[key])
        if not places:
            break
        part, key = places[which % len(places)]
        if leave_out:
            del part[key]
        else:
            part[key] = value
    return json.dumps(stored).encode()


def contents(stored: dict):
    """Contents of a JSON file: `stored` changed as JSON or as bytes."""
    original = json.dumps(stored).encode()
    return st.one_of(CHANGES.map(lambda c: changed(stored, c)), EDITS.map(lambda e: edited(original, e)), st.binary())


# ------------------------------------------------------------------------------------------------------------- readers
# Each takes an empty folder and returns (a strategy, a function of a drawn input). The function raises if the reader
# neither reads nor refuses the input.


def refusing(read, path: Path, content: bytes) -> None:
    """Write `content` to `path` and call `read(path)`; a refusal must name the file."""
    path.write_bytes(content)
    try:
        read(path)
    except (vqa.VQAError, ev.InputError) as error:
        assert str(path) in str(error) or str(path.parent) in str(error), f"names no file: {error}"


def read_row(folder: Path):
    def check(line: bytes) -> None:
        try:
            row = vqa.parse_row(line, "f", 1)
        except vqa.VQAError as error:
            assert str(error) and "\n" not in str(error)
        else:
            for name in (row.id, row.video_id, row.question_type, *row.frames):
                assert not set(name) & set("/\\\0") and name not in (".", ".."), name

    return st.one_of(st.binary(), EDITS.map(lambda e: edited(ROW, e)), contents(json.loads(ROW))), check


def read_row_file(folder: Path):
    path = folder / "rows.jsonl"
    return EDITS.map(lambda e: edited(ROWS, e)), functools.partial(refusing, vqa.read_rows, path)


def read_answers(folder: Path):
    answers = b"".join(
        json.dumps({**{name: row[name] for name in ev.KEY_FIELDS}, "prediction": "a polyp", "finish_reason": "eos"})
        .encode() + b"\n" for row in map(json.loads, ROWS.splitlines())
    )  # fmt: skip
    annotations = ev.read_annotations(FIXTURES / "smoke.jsonl")

    def read(path: Path) -> None:
        with contextlib.suppress(ev.InputError):
            ev.read_annotations(path)
        with contextlib.suppress(ev.InputError):
            ev.read_answer_rows(path)
        ev.match_predictions(annotations, path)

    mixed = st.one_of(EDITS.map(lambda e: edited(answers, e)), EDITS.map(lambda e: edited(ROWS, e)))
    return mixed, functools.partial(refusing, read, folder / "answers.jsonl")


def read_media(kind: str):
    def decode_frame(path: Path) -> None:
        with contextlib.suppress(*vqa.DECODE_ERRORS):
            vqa.upright_size(path)
        try:
            vqa.decode_frame(path)
        finally:
            vqa.decode_frame(path, checking=True)

    def reader(folder: Path):
        original, decode = test_media.any_file(folder, kind), decode_frame
        if kind in vqa.AUDIO_EXTENSIONS:
            decode = vqa.decode_audio
        return EDITS.map(lambda e: edited(original, e)), functools.partial(refusing, decode, folder / f"media{kind}")

    return reader


@functools.cache
def real_settings() -> str:
    """Settings as train_vqa.py writes them, as JSON."""
    flags = [
        "--train_data_path",
        "t",
        "--frames_dir",
        "f",
        "--audio_dir",
        "a",
        "--output_dir",
        "o",
        "--use_cpu",
        "True",
    ]
    arguments = vqa.parse_arguments([*flags, "--model_name_or_path", str(TINY), "--init", "random"])
    with contextlib.redirect_stdout(None):
        processor = vqa.VQAProcessor(vqa.load_tokenizer(TINY), vqa.load_config(TINY), 56)
    return json.dumps(vqa.resolved_settings(*arguments, processor, "0" * 64))


def read_settings(folder: Path):
    original = json.loads(real_settings())
    (folder / "adapter_config.json").write_text("{}")  # without it the base in the settings is not checked

    def read(path: Path) -> None:
        vqa.trained_settings(path.parent, "cpu", {})
        with contextlib.suppress(vqa.VQAError):  # names the folder, and each difference
            vqa.refuse_other_settings(path.parent, original)

    return contents(original), functools.partial(refusing, read, folder / vqa.SETTINGS_FILE)


def read_manifest(folder: Path):
    (folder / "a").write_bytes(b"abc")
    vqa.write_manifest(folder)
    original, path = json.loads((folder / vqa.MANIFEST_FILE).read_bytes()), folder / vqa.MANIFEST_FILE

    def read(path: Path) -> None:
        assert isinstance(vqa.find_damage(path.parent, ["a"]), str | None)

    return contents(original), functools.partial(refusing, read, path)


def read_progress(folder: Path):
    files = {
        vqa.PROGRESS_FILE: {"step": 2, "tr_loss": 0.0, "last_logged": 2, "evaluate": False},
        "trainer_state.json": {"global_step": 2, "epoch": 1.0, "log_history": []},
    }

    def check(drawn: tuple[str, bytes]) -> None:
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        refusing(
            lambda path: vqa.RunGuard(SimpleNamespace(args=SimpleNamespace())).resume(path.parent),
            folder / drawn[0],
            drawn[1],
        )

    return st.one_of(*(st.tuples(st.just(name), contents(content)) for name, content in files.items())), check


def read_model_config(folder: Path):
    original = json.loads((TINY / "config.json").read_text())
    return contents(original), functools.partial(refusing, lambda p: vqa.load_config(p.parent), folder / "config.json")


def read_adapter_config(folder: Path):
    original = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_dropout": 0.05}
    original |= {"bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": ["audio_projector"]}
    return contents(original), functools.partial(refusing, vqa.read_adapter_config, folder / "adapter_config.json")


def read_safetensors(folder: Path):
    path = folder / "adapter_model.safetensors"
    names = [f"base_model.model.layers.0.q_proj.lora_{side}.weight" for side in "AB"]
    save_file({names[0]: torch.ones(4, 8), names[1]: torch.ones(8, 4)}, path)
    original = path.read_bytes()
    (folder / "model.safetensors").symlink_to(path.name)

    def read(path: Path) -> None:
        with contextlib.suppress(vqa.VQAError):
            vqa.read_adapter(path.parent)
        vqa.stored_keys(path.parent)

    return EDITS.map(lambda e: edited(original, e)), functools.partial(refusing, read, path)


def read_features(folder: Path):
    path = folder / "clip.safetensors"
    vqa.write_features(path, torch.arange(12.0).reshape(3, 4), torch.tensor([[1, 6, 4]]))
    original = path.read_bytes()
    return EDITS.map(lambda e: edited(original, e)), functools.partial(refusing, vqa.read_features, path)


def read_training_state(folder: Path):
    """Optimizer, scheduler and random states (torch pickles): any change must be found before one of them is read."""
    files = {"optimizer.pt": {"state": {0: torch.ones(4)}}, "scheduler.pt": {"last_epoch": 1}}
    files["rng_state.pth"] = {"cpu": torch.get_rng_state()}
    for name, state in files.items():
        torch.save(state, folder / name)
    vqa.write_manifest(folder)
    original = {name: (folder / name).read_bytes() for name in files}

    def check(drawn: tuple[str, list]) -> None:
        content = edited(original[drawn[0]], drawn[1])
        (folder / drawn[0]).write_bytes(content)
        damage = vqa.find_damage(folder, list(files))
        assert (damage is None) == (content == original[drawn[0]])
        assert damage is None or damage.startswith(drawn[0])
        (folder / drawn[0]).write_bytes(original[drawn[0]])

    return st.tuples(st.sampled_from(sorted(files)), EDITS), check


READERS = {
    "row": read_row,
    "row_file": read_row_file,
    "answers": read_answers,
    **{kind[1:]: read_media(kind) for kind in KINDS},
    "settings": read_settings,
    "manifest": read_manifest,
    "progress": read_progress,
    "model_config": read_model_config,
    "adapter_config": read_adapter_config,
    "safetensors": read_safetensors,
    "features": read_features,
    "training_state": read_training_state,
}


# ------------------------------------------------------------------------------------------------------------- running


def run_reader(name: str, seconds: float, first_seed: int, folder: str, pipe) -> None:
    """In its own process: draw inputs until `seconds` of CPU time are used; sends the result through `pipe`."""

    def too_long(*_) -> None:
        raise TimeoutError(f"more than {LONGEST} s on one input")

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    strategy, check = READERS[name](Path(folder))
    start, found = time.process_time(), {"examples": 0, "crash": None}
    last = [None]
    base = {"max_examples": 500, "deadline": None, "database": None, "phases": (Phase.generate, Phase.shrink)}

    def spent() -> float:
        return time.process_time() - start

    def attempt(drawn) -> None:
        if spent() >= seconds and found["crash"] is None and last[0] is None:
            return
        found["examples"] += 1
        signal.alarm(LONGEST)
        try:
            check(drawn)
        except BaseException:
            last[0] = (repr(drawn), traceback.format_exc())
            raise
        finally:
            signal.alarm(0)

    for number in range(first_seed, sys.maxsize):
        if spent() >= seconds:
            break
        try:
            seed(number)(settings(**base, suppress_health_check=list(HealthCheck))(given(strategy)(attempt)))()
        except BaseException:
            drawn, trace = last[0] or ("", traceback.format_exc())
            found["crash"] = {"input": drawn, "seed": number, "traceback": trace}
            break
    found |= {"cpu_seconds": spent(), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    pipe.send(found)


def watch(name: str, seconds: float, first_seed: int) -> dict:
    """Run one reader in its process; returns its result, or how it died and the files it was reading."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=run_reader, args=(name, seconds, first_seed, folder, theirs)
        )
        process.start()
        theirs.close()
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in sorted(Path(folder).iterdir())}
            death = f"the process died, status {process.exitcode}"
            found = {"examples": None, "cpu_seconds": None, "crash": {"input": files, "traceback": death}}
        process.join()
    return {"reader": name, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="CPU seconds for each reader (600)")
    parser.add_argument("--reader", nargs="+", default=["all"], choices=["all", *READERS], help="one or more (all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="readers at the same time (number of cores)")
    parser.add_argument(
        "--seed",
        type=int,
        default=int(time.time()),
        help="seed of the first 500 inputs; each further 500 use the next (the time)",
    )
    parser.add_argument("--json", type=Path, help="file for the results. None: only print them")
    args = parser.parse_args()
    names = list(READERS) if "all" in args.reader else args.reader
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(lambda name: watch(name, args.seconds, args.seed), names):
            results.append(found)
            name, crash = found["reader"], found["crash"]
            if crash:
                print(f"{name}: CRASH with {crash['input']}\n{crash['traceback']}", flush=True)
            else:
                spent = f"{found['examples']:,} inputs in {found['cpu_seconds']:.0f} CPU s"
                print(f"{name}: {spent}, no crash, peak memory {found['peak_mib']:.0f} MiB", flush=True)
            if args.json:  # after each reader, so that an interrupted run has the finished ones
                about = {"seed": args.seed, "seconds": args.seconds, "python": sys.version.split()[0]}
                args.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    crashes = sum(bool(found["crash"]) for found in results)
    print(f"{len(results)} readers, {crashes} with a crash")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
