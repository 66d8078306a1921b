"""Do two revisions give the same results? Samples, training, answers, help texts and old files, side by side.

    python benchmarks/same_results.py ef8889b HEAD                      # two git revisions
    python benchmarks/same_results.py ef8889b . --only 'training|help'  # the working tree as it is; some cases alone

A table says of each case how many things were compared and how many differ, a list says what and by how much. Exit
status 0: nothing differs; 1: something does, or fails on both sides and so compares nothing. Tiny model, float32, one
thread a revision, no GPU, three to five minutes on two cores.

Each revision runs in one process of its own, from a copy in a temporary folder, over the same data and models, those of
OLD's tests. What OLD writes first (adapters, models, half-finished runs) is given to both. Equal is equal bit for bit;
logged losses and gradient norms are equal within 1e-6 of their size. Times, versions, hashes of scripts and the git
state are left out; so are tensors of a batch that only NEW has.
"""

import argparse
import contextlib
import difflib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("old", "new")
MODES, FRAME_MODES, AUDIO_TOKENS = ("audio", "audio_text", "text"), ("images", "video"), ("full", "speech")
ARMS = "audio,text,audio_text,mismatched_audio,silent_audio,black_frames,shuffled_frames,first_frame"
SCRIPTS = ("train_vqa.py", "evaluate_checkpoint.py", "merge_stage2_to_bf16.py")
TENSORS = (
    *("input_ids", "labels", "mm_token_type_ids", "position_ids", "attention_mask", "pixel_values"),
    *("image_grid_thw", "video_grid_thw", "input_features", "audio_lengths"),
)
STEPS = (
    "--use_cpu True --seed 1 --max_image_size 56 --max_train_frames 4 --logging_steps 1 --learning_rate 2e-3 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 6 --save_strategy no"
)
LONGER = "--max_steps 12 --learning_rate 5e-3"  # so that answers are the adapter's, not its base's
HALF = "--save_strategy steps --save_steps 3"
LORA, FULL = "--lora_r 4 --lora_dropout 0.05", "--train_decoder full"
TRAINED = {"lora": LORA, "full": FULL, "towers": f"{LORA} --train_vision_tower True"}
MORE_RUNS = {  # beyond the combinations of modes
    "evaluation": f"{LORA} --eval_strategy steps --eval_steps 2 --eval_data_path DATA --max_eval_frames 3",
    "evaluation at the end": f"{LORA} --frame_mode video --eval_data_path DATA",
    "cache_features": f"{LORA} --cache_features features",
    "cache_features, batches of 1": f"{LORA} --cache_features features --per_device_train_batch_size 1",
    "every second layer recomputed": f"{LORA} --checkpoint_every_n 2",
    "no layer recomputed, towers": f"{TRAINED['towers']} --train_audio_encoder True --checkpoint_every_n 0",
    "three frames as video": f"{LORA} --frame_mode video --max_train_frames 3",
    "bf16": f"{LORA} --bf16 True",
    "full, all files": FULL,
}
STATED = ("166,068,224", "9,099,000,320")  # trainable and all parameters at full size
TOLERANCE = 1e-6  # of logged figures, relative
LEFT_OUT = re.compile(r"versions|git|python|.*\.py|.*(seconds|runtime|_ms|duration|per_second)|logging_dir|run_name")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


# --------------------------------------------------------------------------------------------- The worker: one revision


def tidy(value):
    """JSON or text without what two runs of one revision do not share: times, process ids, its temporary folder."""
    if isinstance(value, dict):
        return {key: tidy(part) for key, part in value.items() if not LEFT_OUT.fullmatch(str(key))}
    if isinstance(value, list | tuple):
        return [tidy(part) for part in value]
    if not isinstance(value, str):
        return value
    value = value.replace(str(Path.cwd().parent), "SIDE")
    value = re.sub(r"\b\d+\.\d s\b|\.\d+\.incomplete|[\d.]+(?= samples/s)", "T", value)
    return re.sub(r"'(\w+_(?:runtime|per_second))': '?[\d.e+-]+'?", r"'\1': T", value)


def read_json(path: str | Path):
    """The content of a JSON file, tidied; of a `.jsonl` file the list of its rows."""
    text = Path(path).read_text(encoding="utf-8")
    return tidy([json.loads(line) for line in text.splitlines()] if Path(path).suffix == ".jsonl" else json.loads(text))


def weights(folder: str | Path) -> dict:
    """All tensors that a folder holds, by their keys."""
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


class Worker:
    """One revision's results: a file `NNN.json` a case, and `NNN.safetensors` with its tensors.

    Args:
        side: `old` or `new`; the revision lies in `work`/`side`/code.
        work: its folders `inputs` (data, models) and `shared` (which `old` fills) are for both sides.
    """

    def __init__(self, side: str, work: Path):
        import torch

        torch.set_num_threads(1)
        self.torch, self.side, self.code, self.shared = torch, side, work / side / "code", work / "shared"
        sys.path[0] = str(self.code)  # in place of this script's folder
        self.vqa, self.ev, self.merge = (__import__(name.removesuffix(".py")) for name in SCRIPTS)
        inputs = work / "inputs"
        self.tiny, self.data, self.full_size_model = inputs / "tiny", inputs / "smoke.jsonl", inputs / "full_size_model"
        self.media = ["--frames_dir", inputs / "frames", "--audio_dir", inputs / "audio"]
        self.base, self.layout = ["--model_name_or_path", self.tiny, "--init", "random"], self.shared / "layout 4.47"
        self.results = work / side / "results"

    def run(self, main: Callable, *flags) -> str:
        """What a script's `main` prints; RuntimeError with its complaint where its status is not 0."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(flag) for flag in flags])
        if status:
            raise RuntimeError(f"status {status}: {err.getvalue().strip()}")
        return tidy(out.getvalue())

    def script(self, name: str, *flags) -> dict[str, str]:
        """What a script prints as a process of its own, as a user would start it."""
        command = [sys.executable, str(self.code / name), *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()}")
        return {"printed": tidy(done.stdout)}

    def train(self, folder: str | Path, flags: str, base: list | None = None) -> str:
        """Train into `folder` and return what is printed; of two flags of one name the later one counts."""
        given = [self.data if flag == "DATA" else flag for flag in f"{STEPS} {flags}".split()]
        where = ["--train_data_path", self.data, *self.media, "--output_dir", folder]
        return self.run(self.vqa.main, *where, *(base or self.base), *given)

    def training(self, name: str, flags: str, whole: bool = False) -> dict:
        """The log and the weights of a run; and all else that it leaves with `whole`."""
        printed, folder = self.train(name, flags), Path(name)
        made = {"log": read_json(folder / "trainer_state.json")["log_history"], "saved tensors": weights(folder)}
        if whole:
            made |= {"printed": printed, "files": sorted(path.name for path in folder.iterdir())}
            parts = ("vqa_settings", "adapter_config", "config", "generation_config", "tokenizer")
            made |= {part: read_json(folder / f"{part}.json") for part in parts if (folder / f"{part}.json").exists()}
        return made

    def resumed(self, which: str) -> dict:
        """OLD's half-finished run, taken to its end in a copy of one's own."""
        shutil.copytree(self.shared / f"half {which}", f"resumed {which}")
        made = self.training(f"resumed {which}", f"{TRAINED[which]} {HALF} --resume_from_checkpoint True")
        apart = tensor_differences(weights(self.shared / f"never stopped {which}"), made["saved tensors"])
        return {**made, "beside OLD's run that was never stopped": apart}

    def answers(self, name: str, *flags, whole: bool = False) -> dict:
        """The rows of an evaluation, arm by arm; with `whole` its summary and what it prints too."""
        target = Path("answers") / name / "x.jsonl"
        asked = ["--eval_data_path", self.data, *self.media, "--max_new_tokens", 12, "--output_file", target]
        printed = self.run(self.ev.main, *asked, *flags)
        made = {f"rows of {file.name}": read_json(file) for file in sorted(target.parent.glob("*.jsonl"))}
        return made | ({"summary": read_json(target.with_suffix(".summary.json")), "printed": printed} if whole else {})

    def scores(self) -> dict:
        """What is said of existing rows, those of two arms."""
        self.answers("scored", "--checkpoint_path", self.shared / "adapter", "--arms", "audio,black_frames")
        one, other = Path("answers/scored/x.jsonl"), Path("answers/scored/x.black_frames.jsonl")
        scored = self.run(self.ev.main, "--score_only", "--eval_data_path", self.data, "--output_file", one)
        compared = self.run(self.ev.main, "--compare", one, other)
        summary = read_json(one.with_suffix(".summary.json"))
        return {"--score_only": scored, "its summary": summary, "--compare": compared}

    def samples(self, mode: str, frames: str, sound: str) -> dict:
        """Samples and batches for training, for the loss of evaluation, and for generation."""
        vqa, made, counts = self.vqa, {}, {}
        model, tokenizer = self.model(self.tiny, init="random", seed=1)
        rows = vqa.load_rows(self.data, *self.media[1::2])
        options = {"max_image_size": 112, "input_mode": mode, "audio_tokens": sound, "frame_mode": frames}
        processor = vqa.VQAProcessor(tokenizer, model.config, **options)
        kinds = {"training": {}, "three training frames": {"max_train_frames": 3}}
        kinds["evaluation"] = {"max_eval_frames": 6, "is_eval": True}
        kinds["generation"] = {"max_eval_frames": 5, "is_eval": True, "with_answer": False}
        for kind, options in kinds.items():
            dataset = vqa.SurgicalVQADataset(rows, processor, **options)
            found = {str(index): dataset[index] for index in range(len(dataset))}
            side, drawn = "left" if kind == "generation" else "right", list(found.values())
            marks = {"tokens": ("input_ids", lambda ids: ids == ids), "learned": ("labels", lambda ids: ids != -100)}
            marks["of frames"] = "mm_token_type_ids", lambda kinds: kinds > 0
            marks["of speech"] = "input_ids", lambda ids: ids == model.config.audio_token_id
            counts[kind] = {m: [int(is_one(part[name]).sum()) for part in drawn] for m, (name, is_one) in marks.items()}
            for multiple in (1, 16):
                collate = vqa.VQACollator(tokenizer.pad_token_id, padding_side=side, multiple=multiple)
                found[f"batch, multiple {multiple}"] = collate(drawn)
            for which, part in found.items():
                made[f"{kind} {which}"] = {name: part[name] for name in TENSORS if name in part}
        flags = f"{LORA} --input_mode {mode} --audio_tokens {sound} --frame_mode {frames} --dry_run"
        return {"counts": counts, **made, "--dry_run": self.train("none", flags)}

    def model(self, folder: Path, **options) -> tuple:
        """A model, in float32 unless told otherwise, and its tokenizer."""
        with contextlib.redirect_stdout(io.StringIO()):
            tokenizer = self.vqa.load_tokenizer(folder)
            options = {"dtype": self.torch.float32, "device": "cpu", **options}
            return self.vqa.load_model(folder, tokenizer, **options), tokenizer

    def loaded(self, folder: Path, adapt: Callable = lambda model: model, **options) -> dict:
        """A model as it is in memory: its weights, which of them train, and its tokenizer."""
        model, tokenizer = self.model(folder, **options)
        self.torch.manual_seed(1)
        model = adapt(model)
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, self.torch.Tensor)}
        tokens = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "vocabulary": tokenizer.get_vocab()}
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        return {"weights in memory": state, "trained": trained, "tokenizer": tokens}

    def folded(self, adapter: Path, model):
        """`model` with an adapter in its own weights."""
        return self.vqa.fold_adapter(self.vqa.load_adapter(model, adapter))

    def merged(self, name: str, dtype: str, target: Path) -> dict:
        """The checkpoint that the merge of an adapter writes."""
        flags = ["--stage1_model_path", self.layout, "--stage2_adapter_path", self.shared / name, "--device", "cpu"]
        printed = self.run(self.merge.main, *flags, "--dtype", dtype, "--output_path", target)
        return {"printed": printed, "saved tensors": weights(target)}

    def whole_model(self, name: str) -> dict:
        """A model folder that OLD wrote: its weights in memory, and its answers."""
        flags = ["--max_image_size", 56, "--max_eval_frames", 4, "--dtype", "float32"]
        answers = self.answers(f"of {name}", "--checkpoint_path", self.shared / name, *flags)
        return self.loaded(self.shared / name) | answers

    def full_size(self) -> dict:
        """`--dry_run` of the full-size model."""
        flags = ["--model_name_or_path", self.full_size_model, "--init", "random", "--use_cpu", "True", "--dry_run"]
        made = self.script("train_vqa.py", "--train_data_path", self.data, *self.media, *flags)
        if lacking := [number for number in STATED if number not in made["printed"]]:
            raise RuntimeError(f"--dry_run does not say {', '.join(lacking)}")
        return made

    def write_shared(self) -> None:
        """What both sides are to read; OLD alone calls this."""
        named, whisper = {}, "audio_encoder."
        for name, weight in self.model(self.tiny, init="random", seed=1)[0].named_parameters():
            old_name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            named[old_name] = weight.detach().clone()
        self.write_model("layout 4.47", named)
        self.write_model("plain Qwen2-VL", {k: t for k, t in named.items() if not k.startswith("audio_")})
        ears = {k.replace(whisper, "model.encoder."): t for k, t in named.items() if k.startswith(whisper)}
        self.write_model("whisper", ears, of_whisper=True)
        if HAS_BITSANDBYTES:
            self.write_model("4 bits", quantised(named))
        base = ["--model_name_or_path", self.layout]
        fast = "--train_audio_encoder True --input_mode audio_text --frame_mode video --audio_tokens speech"
        for name, flags in {"adapter": LORA, "towers": f"{TRAINED['towers']} {fast}", "full": FULL}.items():
            self.train(self.shared / name, f"{flags} {LONGER}", base)
        for dtype in ("bfloat16", "float32"):
            self.merged("adapter", dtype, self.shared / f"merged {dtype}")
        for which, flags in TRAINED.items():
            self.train(self.shared / f"never stopped {which}", f"{flags} {HALF}")
            kept = "checkpoint-3"
            shutil.copytree(self.shared / f"never stopped {which}" / kept, self.shared / f"half {which}" / kept)
        (self.shared / "ready").touch()

    def write_model(self, name: str, tensors: dict, of_whisper: bool = False) -> None:
        """A folder of two weight files, and the tiny model's config, flat as 4.47 left it, or that of its Whisper.

        `audio_config` stays, which 4.47 did not write: without it the encoder is taken for Whisper-large-v3-turbo's.
        """
        from safetensors.torch import save_file

        folder, keys = shutil.copytree(self.tiny, self.shared / name), sorted(tensors)
        config = json.loads((folder / "config.json").read_text())
        audio = {**config["audio_config"], "vocab_size": 3}
        (folder / "config.json").write_text(json.dumps(audio if of_whisper else config))
        for part in range(2):
            save_file({key: tensors[key] for key in keys[part::2]}, folder / f"model-{part}.safetensors")
        where = {key: f"model-{place % 2}.safetensors" for place, key in enumerate(keys)}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def cases(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        """(name, function that gives {what is compared: JSON or a dict of tensors}) of every case."""
        combinations = [
            each
            for each in itertools.product(MODES, FRAME_MODES, AUDIO_TOKENS)
            if (each[0], each[2]) != ("text", "speech")  # where nothing is heard, nothing is shortened
        ]
        for each in combinations:
            yield f"samples: {' '.join(each)}", partial(self.samples, *each)
        for (mode, frames, sound), (which, flags) in itertools.product(combinations, TRAINED.items()):
            flags += f" --input_mode {mode} --frame_mode {frames} --audio_tokens {sound}"
            flags += " --train_audio_encoder True" * (which == "towers" and mode != "text")
            name = f"{mode} {frames} {sound} {which}"
            yield f"training: {name}", partial(self.training, name, flags)
        for name, flags in MORE_RUNS.items():
            yield f"training: {name}", partial(self.training, name, flags, whole=True)

        while not (self.shared / "ready").exists():
            time.sleep(0.2)
        ways = {"": [], ", apart": ["--no_merge", "--batch_size", 2], ", cache": ["--cache_features", "kept"]}
        ways[", one by one"] = ["--batch_size", 1, "--train_data_path", self.data]
        for name, (way, flags) in itertools.product(("adapter", "towers"), ways.items()):
            flags = ["--checkpoint_path", self.shared / name, "--arms", ARMS, *flags]
            yield f"answers: {name}{way}", partial(self.answers, name + way, *flags, whole=True)
        flags = [*self.base, "--max_image_size", 56, "--max_eval_frames", 2]
        yield "answers: zero-shot", partial(self.answers, "zero-shot", *flags, whole=True)
        yield "answers: --score_only, --compare", self.scores
        for name in SCRIPTS:
            yield f"help: {name}", partial(self.script, name, "--help")
        yield "dry run: full size", self.full_size

        tiny = partial(self.loaded, self.tiny, init="random", seed=1)
        yield "loading: random weights", tiny
        yield "loading: random weights, bf16", partial(tiny, dtype=self.torch.bfloat16)
        lora = partial(self.vqa.add_lora, r=4, alpha=16, dropout=0.05)
        yield "loading: LoRA", partial(tiny, lora)
        yield "loading: LoRA and towers", partial(tiny, partial(lora, vision_tower=True, audio_encoder=True))
        for name in ("adapter", "towers"):
            path = self.shared / name
            yield f"old files: {name}", partial(self.loaded, self.layout, partial(self.vqa.load_adapter, path=path))
            yield f"old files: {name}, folded", partial(self.loaded, self.layout, partial(self.folded, path))
            for dtype in ("bfloat16", "float32"):
                target = Path(f"merged {name} {dtype}")
                yield f"old files: {name}, merged to {dtype}", partial(self.merged, name, dtype, target)
        four_bit = ["4 bits"] * HAS_BITSANDBYTES
        for name in ("full", "merged bfloat16", "merged float32", "layout 4.47", *four_bit):
            yield f"old files: {name}", partial(self.whole_model, name)
        for name in four_bit:
            yield f"old files: {name}, kept", partial(self.loaded, self.shared / name, load_in_4bit=True)
        graft = partial(self.loaded, self.shared / "plain Qwen2-VL", audio_encoder=self.shared / "whisper", seed=7)
        yield "old files: plain Qwen2-VL and a Whisper", graft
        for which in TRAINED:
            yield f"old files: half-finished run, {which}", partial(self.resumed, which)

    def work(self, only: str) -> None:
        """Run the cases whose names match `only`, and write down what comes of each."""
        from safetensors.torch import save_file

        if self.side == "old":
            self.write_shared()
        for number, (name, case) in enumerate(self.cases()):
            if not re.search(only, name):
                continue
            start = time.perf_counter()
            try:
                made = case()
            except (Exception, SystemExit) as error:  # a refusal is a result too
                made = {"error": tidy(f"{type(error).__name__}: {error}")}
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
            tensors, plain = {}, {}
            for what, value in made.items():
                if not has_tensors(value):
                    plain[what] = value
                    continue
                for key, tensor in value.items():
                    tensors[f"{what}|{key}"] = tensor.detach().clone().contiguous()
            save_file(tensors, self.results / f"{number:03}.safetensors")
            (self.results / f"{number:03}.json").write_text(json.dumps({"case": name, "items": plain}))


def quantised(tensors: dict) -> dict:
    """`tensors` in bfloat16, the decoder's layers and the projector in bitsandbytes' 4 bits, seven tensors for each."""
    import bitsandbytes
    import torch

    made = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    for key in tensors:
        if re.fullmatch(r"model\.layers\..*_proj\.weight|audio_projector\.weight", key):
            quantise = bitsandbytes.functional.quantize_4bit
            made[key], state = quantise(made[key], quant_type="nf4", compress_statistics=True)
            made |= {f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return made


# ------------------------------------------------------------------------------------------------------- The comparison


def read_results(folder: Path) -> dict[str, dict]:
    """{case: {what: JSON, or a dict of tensors}}, as a worker wrote them."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.json")):
        stored = json.loads(file.read_text())
        found[stored["case"]] = stored["items"]
        for key, tensor in load_file(file.with_suffix(".safetensors")).items():
            what, name = key.split("|", 1)
            stored["items"].setdefault(what, {})[name] = tensor
    return found


def has_tensors(value) -> bool:
    """Whether it is a dict of tensors; anything else is JSON."""
    return isinstance(value, dict) and any(hasattr(part, "dtype") for part in value.values())


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """(path, value) of all in a piece of JSON that is neither list nor object, and of empty ones."""
    if value and isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def tensor_differences(old: dict, new: dict) -> list[str]:
    """A line on each tensor that is missing or of another kind, and one on all whose values differ."""
    import torch

    lines = [f"{name}: only in OLD" for name in old if name not in new]
    lines += [f"{name}: only in NEW" for name in new if name not in old]
    both, apart = [name for name in old if name in new], {}
    for name in both:
        one, other = old[name], new[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            lines.append(f"{name}: {one.dtype} {list(one.shape)} -> {other.dtype} {list(other.shape)}")
        elif not torch.equal(one, other):
            apart[name] = (one.double() - other.double()).abs().max().item()
    if apart:
        worst = max(apart, key=apart.get)
        lines.append(f"{len(apart)} of {len(both)} tensors differ, by up to {apart[worst]:.3g} ({worst})")
    return lines


def json_differences(old, new, tolerance: float) -> list[str]:
    """A line on each leaf that differs; numbers within `tolerance` of their size are equal."""
    one, other, lines = dict(leaves(old)), dict(leaves(new)), []
    for path in one | other:
        a, b = (side.get(path, "(absent)") for side in (one, other))
        if type(a) is type(b) is float:
            apart = abs(a - b) / (max(abs(a), abs(b)) or 1)
            if apart > tolerance or (apart != apart and repr(a) != repr(b)):  # NaN is like NaN
                lines.append(f"{path}: {a} -> {b} (relative {apart:.2g})")
        elif type(a) is not type(b) or a != b:
            lines.append(f"{path}: {a!r:.160} -> {b!r:.160}")
    return lines


def differences(what: str, old, new) -> list[str]:
    """Lines on what differs between the two values of one thing; none where they are equal."""
    if isinstance(old, str) and isinstance(new, str) and "\n" in old + new:
        return list(difflib.unified_diff(old.splitlines(), new.splitlines(), "OLD", "NEW", lineterm="", n=1))
    if has_tensors(old) and has_tensors(new):
        return tensor_differences(old, new)
    return json_differences(old, new, TOLERANCE if what == "log" else 0.0)


def compare_case(name: str, old: dict, new: dict) -> tuple[int, dict[str, list[str]]]:
    """(things compared, {what differs: lines on it}) of one case."""
    if "error" in old or "error" in new:
        said = [f"{side}: {found.get('error', 'goes through')}" for side, found in (("OLD", old), ("NEW", new))]
        return 1, {"fails": "\n".join(said).splitlines()}
    if name.startswith("samples"):  # what NEW adds to a batch is its own affair
        for what in old.keys() & new.keys():
            if has_tensors(new[what]):
                new[what] = {key: tensor for key, tensor in new[what].items() if key in old[what]}
    found = {what: ["only in OLD" if what in old else "only in NEW"] for what in old.keys() ^ new.keys()}
    found |= {what: differences(what, old[what], new[what]) for what in old if what in new}
    return len(found), {what: lines for what, lines in found.items() if lines}


def report(old: dict[str, dict], new: dict[str, dict], most: int) -> int:
    """Print the table and the differences, `most` lines of each (of help texts all); returns how many differ."""
    outcome = {name: compare_case(name, old.get(name, {}), new.get(name, {})) for name in old | new}
    width, seen = max(map(len, outcome)), {}
    print(f"{'case':{width}}  compared  differ")
    for name, (count, found) in outcome.items():
        print(f"{name:{width}}  {count:8}  {len(found) or '-':>6}")
    for name, (_, found) in outcome.items():
        print(*["", name] * bool(found), sep="\n", end="\n" * bool(found))
        for what, lines in found.items():
            first = seen.setdefault((what, *lines), name)
            shown = [f"as in {first}"] if first != name else lines if name.startswith("help") else lines[:most]
            rest = [f"... and {len(lines) - most} lines more"] if shown == lines[:most] != lines else []
            print(f"  {what}", *(f"    {line}" for line in [*shown, *rest]), sep="\n")
    differ = sum(len(found) for _, found in outcome.values())
    print(f"\n{sum(count for count, _ in outcome.values())} compared, {differ} differ")
    return differ


# --------------------------------------------------------------------------------------------------------- Command line


def export(revision: str, folder: Path) -> str:
    """Put a revision, or the tree of a folder as it is, into `folder`; says which it was. Exits where it is neither."""
    if (Path(revision) / "train_vqa.py").is_file():
        shutil.copytree(revision, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "checkpoints", "results"))
        return f"the folder {Path(revision).resolve()}"
    git = ["git", "-C", str(ROOT)]
    packed = subprocess.run([*git, "archive", revision], capture_output=True)
    if packed.returncode:
        sys.exit(f"error: {revision}: no folder with train_vqa.py, and no revision ({packed.stderr.decode().strip()})")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return subprocess.check_output([*git, "log", "-1", "--format=%h %s", revision], text=True).strip()[:100]


def write_inputs(fixtures: Path, inputs: Path) -> None:
    """A copy of the fixtures, and in `tiny` the tiny model with ears for 4 s (200 tokens), to be quick."""
    shutil.copytree(fixtures, inputs)
    path = shutil.copytree(inputs / "tiny_model", inputs / "tiny") / "config.json"
    config = json.loads(path.read_text())
    config["audio_config"]["max_source_positions"] = 200
    path.write_text(json.dumps(config))


def run_workers(work: Path, only: str) -> None:
    """Both workers at once, to their end. Exits with the log of one that dies, having ended the other."""
    workers = {}
    for side in SIDES:
        (work / side / "run").mkdir()
        (work / side / "results").mkdir()
        own = {"XDG_CACHE_HOME": str(work / side / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), side, str(work), "--worker", "--only", only]
        with open(work / side / "log.txt", "w") as log:
            options = {"cwd": work / side / "run", "stdout": log, "stderr": log, "env": {**os.environ, **own}}
            workers[side] = subprocess.Popen(command, **options)
    try:
        while any(w.poll() is None for w in workers.values()) and not any(w.poll() for w in workers.values()):
            time.sleep(0.2)
        dead = [side for side, worker in workers.items() if worker.poll()]
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    for side in dead:
        sys.exit(
            f"{(work / side / 'log.txt').read_text()[-4000:]}\nerror: the process of {side.upper()} died, see above"
        )


def main() -> int:
    """Compare as the flags say; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="The part on 4-bit weights needs bitsandbytes (pip install bitsandbytes==0.48.2 --no-deps will do); "
        "where it is not installed, that part is skipped, and a line says so.",
    )
    parser.add_argument("old", metavar="OLD", help="git revision, or a folder, which is taken as it is")
    parser.add_argument("new", metavar="NEW", help="the same, to be compared with OLD")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cases whose names match. Default: all")
    parser.add_argument(
        "--lines", type=int, default=8, help="shown of each difference, 8 unless told; of help texts all are"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for all that both write. None: removed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # OLD is a side, NEW the work folder
    args = parser.parse_args()
    if args.worker:
        Worker(args.old, Path(args.new)).work(args.only)
        return 0
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        work = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same_results.")))
        work = work.resolve()
        for side in SIDES:
            print(f"{side.upper()}: {export(getattr(args, side), work / side / 'code')}", flush=True)
        write_inputs(work / "old/code/tests/fixtures", work / "inputs")
        (work / "shared").mkdir()
        run_workers(work, args.only)
        results = [read_results(work / side / "results") for side in SIDES]
        if not any(results):
            sys.exit(f"error: --only {args.only}: no case has such a name")
        differ = report(*results, args.lines)
    if not HAS_BITSANDBYTES:
        print("Skipped: 4-bit weights (bitsandbytes is not installed)")
    print(f"{time.perf_counter() - start:.0f} s")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
