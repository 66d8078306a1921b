"""Do two revisions give the same results? Compares samples, training, answers, help texts and old files.

    python benchmarks/same_results.py ef8889b HEAD                      # two git revisions
    python benchmarks/same_results.py ef8889b . --only 'training|help'  # a folder as it is; only some cases

A table gives for each case how many items were compared and how many differ; a list says what differs and by how much.
Exit status 0: nothing differs; 1: something differs, or fails on both sides so that nothing can be compared. Tiny
model, float32, one thread per revision, no GPU, three to five minutes on two cores.

Each revision runs in its own process, from a copy in a temporary folder, on the same data and models: those of OLD's
tests. OLD first writes files (adapters, models, half-finished runs) that both then read. Items must be equal bit for
bit, except logged losses and gradient norms, which may differ by 1e-6 of their size. Times, versions, hashes of scripts
and the git state are not compared, nor are tensors of a batch that only NEW has.
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
LONGER = "--max_steps 12 --learning_rate 5e-3"  # so that the adapter changes the answers of its base
HALF = "--save_strategy steps --save_steps 3"
LORA, FULL = "--lora_r 4 --lora_dropout 0.05", "--train_decoder full"
TRAINED = {"lora": LORA, "full": FULL, "encoders": f"{LORA} --train_vision_tower True"}
MORE_RUNS = {  # beyond the combinations of modes
    "evaluation": f"{LORA} --eval_strategy steps --eval_steps 2 --eval_data_path DATA --max_eval_frames 3",
    "evaluation at the end": f"{LORA} --frame_mode video --eval_data_path DATA",
    "cache_features": f"{LORA} --cache_features features",
    "cache_features, batches of 1": f"{LORA} --cache_features features --per_device_train_batch_size 1",
    "every second layer recomputed": f"{LORA} --checkpoint_every_n 2",
    "no layer recomputed, encoders": f"{TRAINED['encoders']} --train_audio_encoder True --checkpoint_every_n 0",
    "three frames as video": f"{LORA} --frame_mode video --max_train_frames 3",
    "bf16": f"{LORA} --bf16 True",
    "full, all files": FULL,
}
STATED = ("166,068,224", "9,099,000,320")  # trainable and all parameters at full size
TOLERANCE = 1e-6  # relative, of logged figures
LEFT_OUT = re.compile(r"versions|git|python|.*\.py|.*(seconds|runtime|_ms|duration|per_second)|logging_dir|run_name|at")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


# --------------------------------------------------------------------------------------------- The worker: one revision


def tidy(value):
    """JSON or text without what differs between two runs of one revision: times, process ids, the temporary folder."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if not LEFT_OUT.fullmatch(str(key))}
        for name in {"sha256", "output_file"} & kept.keys():  # of rows, which say how long they took
            if re.fullmatch("[0-9a-f]{64}", str(kept[name])):
                del kept[name]
        return {key: tidy(part) for key, part in kept.items()}
    if isinstance(value, list | tuple):
        return [tidy(part) for part in value]
    if not isinstance(value, str):
        return value
    value = value.replace(str(Path.cwd().parent), "SIDE")
    value = re.sub(r"\b\d+\.\d s\b|\.\d+\.incomplete|[\d.]+(?= samples/s)", "T", value)
    return re.sub(r"'(\w+_(?:runtime|per_second))': '?[\d.e+-]+'?", r"'\1': T", value)


def read_json(path: str | Path):
    """The tidied content of a JSON file; for a `.jsonl` file a list of its rows."""
    text = Path(path).read_text(encoding="utf-8")
    return tidy([json.loads(line) for line in text.splitlines()] if Path(path).suffix == ".jsonl" else json.loads(text))


def weights(folder: str | Path) -> dict:
    """All tensors in a folder, by their keys."""
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


class Worker:
    """The results of one revision: for each case a file `NNN.json`, and `NNN.safetensors` with its tensors.

    Args:
        side: `old` or `new`; the revision is in `work`/`side`/code.
        work: both sides read its folders `inputs` (data, models) and `shared` (written by `old`).
    """

    def __init__(self, side: str, work: Path):
        import torch

        torch.set_num_threads(1)
        self.torch, self.side, self.code, self.shared = torch, side, work / side / "code", work / "shared"
        sys.path[0] = str(self.code)  # instead of this script's folder
        self.vqa, self.ev, self.merge = (__import__(name.removesuffix(".py")) for name in SCRIPTS)
        inputs = work / "inputs"
        self.tiny, self.data, self.full_size_model = inputs / "tiny", inputs / "smoke.jsonl", inputs / "full_size_model"
        self.media = ["--frames_dir", inputs / "frames", "--audio_dir", inputs / "audio"]
        self.base, self.layout = ["--model_name_or_path", self.tiny, "--init", "random"], self.shared / "layout 4.47"
        self.results = work / side / "results"

    def run(self, main: Callable, *flags) -> str:
        """What a script's `main` prints; RuntimeError with its error text if its status is not 0."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(flag) for flag in flags])
        if status:
            raise RuntimeError(f"status {status}: {err.getvalue().strip()}")
        return tidy(out.getvalue())

    def script(self, name: str, *flags) -> dict[str, str]:
        """What a script prints in its own process, as a user starts it."""
        command = [sys.executable, str(self.code / name), *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()}")
        return {"printed": tidy(done.stdout)}

    def train(self, folder: str | Path, flags: str, base: list | None = None) -> str:
        """Train into `folder` and return what is printed; of two equal flags the later one counts."""
        given = [self.data if flag == "DATA" else flag for flag in f"{STEPS} {flags}".split()]
        where = ["--train_data_path", self.data, *self.media, "--output_dir", folder]
        return self.run(self.vqa.main, *where, *(base or self.base), *given)

    def training(self, name: str, flags: str, everything: bool = False) -> dict:
        """The log and the weights of a run; with `everything` also its other files and its output."""
        printed, folder = self.train(name, flags), Path(name)
        made = {"log": read_json(folder / "trainer_state.json")["log_history"], "saved tensors": weights(folder)}
        if everything:
            made |= {"printed": printed, "files": sorted(path.name for path in folder.iterdir())}
            parts = ("vqa_settings", "adapter_config", "config", "generation_config", "tokenizer")
            made |= {part: read_json(folder / f"{part}.json") for part in parts if (folder / f"{part}.json").exists()}
        return made

    def resumed(self, which: str) -> dict:
        """OLD's half-finished run, copied and trained to its end."""
        shutil.copytree(self.shared / f"half {which}", f"resumed {which}")
        made = self.training(f"resumed {which}", f"{TRAINED[which]} {HALF} --resume_from_checkpoint True")
        differing = tensor_differences(weights(self.shared / f"never stopped {which}"), made["saved tensors"])
        return {**made, "beside OLD's run that was never stopped": differing}

    def answers(self, name: str, *flags, everything: bool = False) -> dict:
        """The rows of an evaluation, arm by arm; with `everything` also its summary and its output."""
        target = Path("answers") / name / "x.jsonl"
        asked = ["--eval_data_path", self.data, *self.media, "--max_new_tokens", 12, "--output_file", target]
        printed = self.run(self.ev.main, *asked, *flags)
        made = {f"rows of {file.name}": read_json(file) for file in sorted(target.parent.glob("*.jsonl"))}
        if everything:
            made |= {"summary": read_json(target.with_suffix(".summary.json")), "printed": printed}
        return made

    def scores(self) -> dict:
        """The scores and the comparison of existing rows, those of two arms."""
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
        """A model, in float32 by default, and its tokenizer."""
        with contextlib.redirect_stdout(io.StringIO()):
            tokenizer = self.vqa.load_tokenizer(folder)
            options = {"dtype": self.torch.float32, "device": "cpu", **options}
            return self.vqa.load_model(folder, tokenizer, **options), tokenizer

    def loaded(self, folder: Path, adapt: Callable = lambda model: model, **options) -> dict:
        """A model in memory: its weights, which of them train, and its tokenizer."""
        model, tokenizer = self.model(folder, **options)
        self.torch.manual_seed(1)
        model = adapt(model)
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, self.torch.Tensor)}
        tokens = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "vocabulary": tokenizer.get_vocab()}
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        return {"weights in memory": state, "trained": trained, "tokenizer": tokens}

    def merged_in_memory(self, adapter: Path, model):
        """`model` with an adapter merged into its weights."""
        merge = getattr(self.vqa, "merge_adapter", None) or self.vqa.fold_adapter  # its name up to commit d04b519
        return merge(self.vqa.load_adapter(model, adapter))

    def merged(self, name: str, dtype: str, target: Path) -> dict:
        """The checkpoint that merge_stage2_to_bf16.py writes for an adapter."""
        flags = ["--stage1_model_path", self.layout, "--stage2_adapter_path", self.shared / name, "--device", "cpu"]
        printed = self.run(self.merge.main, *flags, "--dtype", dtype, "--output_path", target)
        return {"printed": printed, "saved tensors": weights(target)}

    def full_model(self, name: str) -> dict:
        """A model folder that OLD wrote: its weights in memory, and its answers."""
        flags = ["--max_image_size", 56, "--max_eval_frames", 4, "--dtype", "float32"]
        base = not (self.shared / name / "vqa_settings.json").is_file()  # a trained model would have to say its prompt
        subject = "--model_name_or_path" if base else "--checkpoint_path"
        answers = self.answers(f"of {name}", subject, self.shared / name, *flags)
        return self.loaded(self.shared / name) | answers

    def full_size(self) -> dict:
        """`--dry_run` of the full-size model."""
        flags = ["--model_name_or_path", self.full_size_model, "--init", "random", "--use_cpu", "True", "--dry_run"]
        made = self.script("train_vqa.py", "--train_data_path", self.data, *self.media, *flags)
        if lacking := [number for number in STATED if number not in made["printed"]]:
            raise RuntimeError(f"--dry_run does not say {', '.join(lacking)}")
        return made

    def write_shared(self) -> None:
        """Write the files that both sides read; only OLD calls this."""
        named, whisper = {}, "audio_encoder."
        for name, weight in self.model(self.tiny, init="random", seed=1)[0].named_parameters():
            old_name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            named[old_name] = weight.detach().clone()
        self.write_model("layout 4.47", named)
        self.write_model("plain Qwen2-VL", {k: t for k, t in named.items() if not k.startswith("audio_")})
        encoder = {k.replace(whisper, "model.encoder."): t for k, t in named.items() if k.startswith(whisper)}
        self.write_model("whisper", encoder, of_whisper=True)
        if HAS_BITSANDBYTES:
            self.write_model("4 bits", quantised(named))
        base = ["--model_name_or_path", self.layout]
        fast = "--train_audio_encoder True --input_mode audio_text --frame_mode video --audio_tokens speech"
        for name, flags in {"adapter": LORA, "encoders": f"{TRAINED['encoders']} {fast}", "full": FULL}.items():
            self.train(self.shared / name, f"{flags} {LONGER}", base)
        for dtype in ("bfloat16", "float32"):
            self.merged("adapter", dtype, self.shared / f"merged {dtype}")
        for which, flags in TRAINED.items():
            self.train(self.shared / f"never stopped {which}", f"{flags} {HALF}")
            kept = "checkpoint-3"
            shutil.copytree(self.shared / f"never stopped {which}" / kept, self.shared / f"half {which}" / kept)
        (self.shared / "ready").touch()

    def write_model(self, name: str, tensors: dict, of_whisper: bool = False) -> None:
        """Write a folder of two weight files and the tiny model's config, flat as 4.47 wrote it, or that of its
        Whisper.

        4.47 did not write `audio_config`, but it is kept: without it the encoder would have the sizes of
        Whisper-large-v3-turbo.
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
        """(name, function that returns {item: JSON or a dict of tensors}) of every case."""
        combinations = [
            each
            for each in itertools.product(MODES, FRAME_MODES, AUDIO_TOKENS)
            if (each[0], each[2]) != ("text", "speech")  # no speech in this mode
        ]
        for each in combinations:
            yield f"samples: {' '.join(each)}", partial(self.samples, *each)
        for (mode, frames, sound), (which, flags) in itertools.product(combinations, TRAINED.items()):
            flags += f" --input_mode {mode} --frame_mode {frames} --audio_tokens {sound}"
            flags += " --train_audio_encoder True" * (which == "encoders" and mode != "text")
            name = f"{mode} {frames} {sound} {which}"
            yield f"training: {name}", partial(self.training, name, flags)
        for name, flags in MORE_RUNS.items():
            yield f"training: {name}", partial(self.training, name, flags, everything=True)

        while not (self.shared / "ready").exists():
            time.sleep(0.2)
        ways = {"": [], ", unmerged": ["--no_merge", "--batch_size", 2], ", cache": ["--cache_features", "kept"]}
        ways[", one by one"] = ["--batch_size", 1, "--train_data_path", self.data]
        for name, (way, flags) in itertools.product(("adapter", "encoders"), ways.items()):
            flags = ["--checkpoint_path", self.shared / name, "--arms", ARMS, *flags]
            yield f"answers: {name}{way}", partial(self.answers, name + way, *flags, everything=True)
        flags = [*self.base, "--max_image_size", 56, "--max_eval_frames", 2]
        yield "answers: zero-shot", partial(self.answers, "zero-shot", *flags, everything=True)
        yield "answers: --score_only, --compare", self.scores
        for name in SCRIPTS:
            yield f"help: {name}", partial(self.script, name, "--help")
        yield "dry run: full size", self.full_size

        tiny = partial(self.loaded, self.tiny, init="random", seed=1)
        yield "loading: random weights", tiny
        yield "loading: random weights, bf16", partial(tiny, dtype=self.torch.bfloat16)
        lora = partial(self.vqa.add_lora, r=4, alpha=16, dropout=0.05)
        yield "loading: LoRA", partial(tiny, lora)
        yield "loading: LoRA and encoders", partial(tiny, partial(lora, vision_tower=True, audio_encoder=True))
        for name in ("adapter", "encoders"):
            path = self.shared / name
            yield f"old files: {name}", partial(self.loaded, self.layout, partial(self.vqa.load_adapter, path=path))
            yield f"old files: {name}, merged", partial(self.loaded, self.layout, partial(self.merged_in_memory, path))
            for dtype in ("bfloat16", "float32"):
                target = Path(f"merged {name} {dtype}")
                yield f"old files: {name}, merged to {dtype}", partial(self.merged, name, dtype, target)
        four_bit = ["4 bits"] * HAS_BITSANDBYTES
        for name in ("full", "merged bfloat16", "merged float32", "layout 4.47", *four_bit):
            yield f"old files: {name}", partial(self.full_model, name)
        for name in four_bit:
            yield f"old files: {name}, kept", partial(self.loaded, self.shared / name, load_in_4bit=True)
        graft = partial(self.loaded, self.shared / "plain Qwen2-VL", audio_encoder=self.shared / "whisper", seed=7)
        yield "old files: plain Qwen2-VL and a Whisper", graft
        for which in TRAINED:
            yield f"old files: half-finished run, {which}", partial(self.resumed, which)

    def work(self, only: str) -> None:
        """Run the cases whose names match `only`, and write the results of each."""
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
    """`tensors` in bfloat16; the decoder's layers and the projector in bitsandbytes' 4 bits, seven tensors for each."""
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
    """{case: {item: JSON or a dict of tensors}}, as a worker wrote them."""
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
    """Whether `value` is a dict of tensors; everything else is JSON."""
    return isinstance(value, dict) and any(hasattr(part, "dtype") for part in value.values())


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """(path, value) of every value in JSON that is neither a list nor an object, or is empty."""
    if value and isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def tensor_differences(old: dict, new: dict) -> list[str]:
    """A line for each tensor that is missing or has another shape or dtype, and one for all whose values differ."""
    import torch

    lines = [f"{name}: only in OLD" for name in old if name not in new]
    lines += [f"{name}: only in NEW" for name in new if name not in old]
    both, differing = [name for name in old if name in new], {}
    for name in both:
        one, other = old[name], new[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            lines.append(f"{name}: {one.dtype} {list(one.shape)} -> {other.dtype} {list(other.shape)}")
        elif not torch.equal(one, other):
            differing[name] = (one.double() - other.double()).abs().max().item()
    if differing:
        worst = max(differing, key=differing.get)
        lines.append(f"{len(differing)} of {len(both)} tensors differ, by up to {differing[worst]:.3g} ({worst})")
    return lines


def json_differences(old, new, tolerance: float) -> list[str]:
    """A line for each leaf that differs; numbers may differ by `tolerance` of their size."""
    one, other, lines = dict(leaves(old)), dict(leaves(new)), []
    for path in one | other:
        a, b = (side.get(path, "(absent)") for side in (one, other))
        if type(a) is type(b) is float:
            relative = abs(a - b) / (max(abs(a), abs(b)) or 1)
            if relative > tolerance or (relative != relative and repr(a) != repr(b)):  # NaN equals NaN
                lines.append(f"{path}: {a} -> {b} (relative {relative:.2g})")
        elif type(a) is not type(b) or a != b:
            lines.append(f"{path}: {a!r:.160} -> {b!r:.160}")
    return lines


def differences(what: str, old, new) -> list[str]:
    """Lines about the differences between the two values of one item; empty if they are equal."""
    if isinstance(old, str) and isinstance(new, str) and "\n" in old + new:
        return list(difflib.unified_diff(old.splitlines(), new.splitlines(), "OLD", "NEW", lineterm="", n=1))
    if has_tensors(old) and has_tensors(new):
        return tensor_differences(old, new)
    return json_differences(old, new, TOLERANCE if what == "log" else 0.0)


def compare_case(name: str, old: dict, new: dict) -> tuple[int, dict[str, list[str]]]:
    """(number of items compared, {item that differs: lines about it}) of one case."""
    if "error" in old or "error" in new:
        said = [f"{side}: {found.get('error', 'works')}" for side, found in (("OLD", old), ("NEW", new))]
        return 1, {"fails": "\n".join(said).splitlines()}
    if name.startswith("samples"):  # tensors that NEW adds to a batch are not compared
        for what in old.keys() & new.keys():
            if has_tensors(new[what]):
                new[what] = {key: tensor for key, tensor in new[what].items() if key in old[what]}
    found = {what: ["only in OLD" if what in old else "only in NEW"] for what in old.keys() ^ new.keys()}
    found |= {what: differences(what, old[what], new[what]) for what in old if what in new}
    return len(found), {what: lines for what, lines in found.items() if lines}


def report(old: dict[str, dict], new: dict[str, dict], most: int) -> int:
    """Print the table and the differences, `most` lines of each (help texts: all); returns how many items differ."""
    outcome = {name: compare_case(name, old.get(name, {}), new.get(name, {})) for name in old | new}
    width, printed = max(map(len, outcome)), {}
    print(f"{'case':{width}}  compared  differ")
    for name, (count, found) in outcome.items():
        print(f"{name:{width}}  {count:8}  {len(found) or '-':>6}")
    for name, (_, found) in outcome.items():
        print(*["", name] * bool(found), sep="\n", end="\n" * bool(found))
        for what, lines in found.items():
            first = printed.setdefault((what, *lines), name)
            shown = [f"as in {first}"] if first != name else lines if name.startswith("help") else lines[:most]
            rest = [f"... and {len(lines) - most} lines more"] if shown == lines[:most] != lines else []
            print(f"  {what}", *(f"    {line}" for line in [*shown, *rest]), sep="\n")
    differ = sum(len(found) for _, found in outcome.values())
    print(f"\n{sum(count for count, _ in outcome.values())} compared, {differ} differ")
    return differ


# --------------------------------------------------------------------------------------------------------- Command line


def export(revision: str, folder: Path) -> str:
    """Copy a revision, or a folder as it is, to `folder`; returns which it was. Exits if `revision` is neither."""
    if (Path(revision) / "train_vqa.py").is_file():
        shutil.copytree(revision, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "checkpoints", "results"))
        return f"the folder {Path(revision).resolve()}"
    git = ["git", "-C", str(ROOT)]
    packed = subprocess.run([*git, "archive", revision], capture_output=True)
    if packed.returncode:
        reason = packed.stderr.decode().strip()
        sys.exit(f"error: {revision}: neither a folder with train_vqa.py nor a git revision ({reason})")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return subprocess.check_output([*git, "log", "-1", "--format=%h %s", revision], text=True).strip()[:100]


def write_inputs(fixtures: Path, inputs: Path) -> None:
    """Copy the fixtures, and in `tiny` the tiny model with a speech encoder for only 4 s (200 tokens), to save time."""
    shutil.copytree(fixtures, inputs)
    path = shutil.copytree(inputs / "tiny_model", inputs / "tiny") / "config.json"
    config = json.loads(path.read_text())
    config["audio_config"]["max_source_positions"] = 200
    path.write_text(json.dumps(config))


def run_workers(work: Path, only: str) -> None:
    """Run both workers at the same time. If one dies, ends the other and exits with the log."""
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
        epilog="The cases with 4-bit weights need bitsandbytes (pip install bitsandbytes==0.48.2 --no-deps is enough). "
        "If it is not installed, they are skipped, and a line says so.",
    )
    parser.add_argument("old", metavar="OLD", help="git revision, or a folder, used as it is")
    parser.add_argument("new", metavar="NEW", help="the same, compared with OLD")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cases whose names match. Default: all")
    parser.add_argument(
        "--lines", type=int, default=8, help="lines shown of each difference (8); of help texts all are shown"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for all files of both. None: removed")
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
