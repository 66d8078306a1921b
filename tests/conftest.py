"""What the tests share: paths, small helpers, one tiny model and one tiny checkpoint a session of tests."""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.warm import warm_python

ROOT = Path(vqa.__file__).resolve().parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
TINY, FULL_SIZE = FIXTURES / "tiny_model", FIXTURES / "full_size_model"
MEDIA = ("--frames_dir", str(FIXTURES / "frames"), "--audio_dir", str(FIXTURES / "audio"))
TRAIN_DATA = ("--train_data_path", str(FIXTURES / "smoke.jsonl"), *MEDIA)
EVAL_DATA = ("--eval_data_path", str(FIXTURES / "smoke.jsonl"), *MEDIA)
SMALL = ("--max_image_size", "56", "--max_train_frames", "2", "--lora_r", "4", "--disable_tqdm", "True")
PAD, AUDIO, IMAGE, VIDEO, IM_END, END_OF_TEXT = 497, 494, 492, 493, 482, 480  # ids of the tiny model
# Six steps, over two epochs of three, with dropout: the run that `trained` shows undisturbed and others disturb.
SIX_STEPS = (
    *("--lora_dropout", "0.3", "--learning_rate", "1e-2", "--per_device_train_batch_size", "1", "--logging_steps", "2"),
    *("--gradient_accumulation_steps", "2", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "100"),
)
EVALUATION = (*EVAL_DATA[:2], "--max_eval_samples", "2", "--eval_strategy", "steps", "--eval_steps", "3",
              "--per_device_eval_batch_size", "1", "--max_eval_frames", "2")  # fmt: skip
torch.set_num_threads(1)  # with more, every operation waits for cores that other work holds


def refusal(function, *args, **kwargs) -> str:
    """The text of the error with which the call is refused."""
    with pytest.raises((vqa.VQAError, ev.InputError)) as error:
        function(*args, **kwargs)
    return str(error.value)


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_time(row: dict) -> dict:
    """What two runs of the same command write alike."""
    return {name: value for name, value in row.items() if name != "inference_time_ms"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def edit_json(path, **changes):
    """Change fields of a JSON object on disk; a dict is merged into the one that is there."""
    stored = json.loads(path.read_text())
    for name, value in changes.items():
        stored[name] = {**stored[name], **value} if isinstance(value, dict) and name in stored else value
    path.write_text(json.dumps(stored))


def stir(model, part="lora_", scale=0.1, seed=3):
    """Draw the parameters whose names hold `part` anew, so that an adapter does something; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name and p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def last_logits(model, batch):
    """Of each row's last position, [rows, 512]."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "row_indices")}
    with torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[:, -1]


def weights_of(folder):
    """The tensors of an adapter or a model."""
    files = (Path(folder) / name for name in ("adapter_model.safetensors", "model.safetensors"))
    return load_file(next(file for file in files if file.exists()))


def same_tensors(one, other):
    """Whether two dicts hold the same names and, bit for bit, the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run_script(script, *flags, folder, **environment):
    """Run a script from `folder` with this interpreter; returns what it printed. One thread: cores may be shared."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", str(script), *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def small_disk(folder: Path, kib: int):
    """A tmpfs of `kib` KiB at `folder`; skips where that takes rights that these tests lack."""
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """What media passed is remembered in the user's cache folder, which is none of the tests' business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    """The Trainer collects garbage in each run: half a million objects of the imports, looked at for 0.3 s in vain."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny model's folder; its speech encoder hears 4 s (200 tokens) in place of 30 s, to be quick."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "tiny")
    edit_json(folder / "config.json", audio_config={"max_source_positions": 200})
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny model's tokenizer after `load_tokenizer`: `<|pad|>` is 497."""
    return vqa.load_tokenizer(TINY)


@pytest.fixture()
def fresh(tiny, tokenizer):
    """Builds a tiny model of the test's own: same weights as `base`."""
    return lambda **kwargs: vqa.load_model(
        tiny, tokenizer, **{"init": "random", "seed": 1, "dtype": torch.float32, **kwargs}
    )


@pytest.fixture(scope="session")
def base(tiny, tokenizer):
    """The tiny model with random weights, float32; tests must not change it."""
    return vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)


@pytest.fixture(scope="session")
def rows():
    """The five fixture rows, media found and decoded."""
    return vqa.load_rows(FIXTURES / "smoke.jsonl", FIXTURES / "frames", FIXTURES / "audio")


@pytest.fixture(scope="session")
def processor(tokenizer, base):
    """Frames of at most 56 px: 4 tokens each."""
    return vqa.VQAProcessor(tokenizer, base.config, max_image_size=56)


@pytest.fixture(scope="session")
def batch(processor, rows):
    """Two training samples of two frames and different length, right-padded."""
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    return vqa.VQACollator(PAD)([dataset[0], dataset[3]])


@pytest.fixture(scope="session")
def argv(tiny):
    """Makes the flags of a small run of train_vqa.py from the tiny model's random weights."""
    small = (*TRAIN_DATA, "--model_name_or_path", str(tiny), "--init", "random", "--seed", "1", *SMALL)
    return lambda folder, *more: [*small, "--output_dir", str(folder), *map(str, more)]


@pytest.fixture(scope="session")
def train(argv):
    """Runs train_vqa.py so, in this process; returns its exit status."""
    return lambda folder, *more: vqa.main(argv(folder, *more))


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory):
    """A LoRA run of six steps that nothing disturbed, evaluated after the third and sixth, with a checkpoint at each
    second. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert train(folder, *SIX_STEPS, *EVALUATION, "--save_steps", "2") == 0
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A Python for other processes that need not import torch; see warm.py."""
    with warm_python(tmp_path_factory.mktemp("warm") / "python") as path:
        yield str(path)


@pytest.fixture(scope="session")
def smoke(warm, tmp_path_factory):
    """(folder, what `train_with_eval_FINAL.sh --smoke` printed there). It takes a minute, with two thirds of the steps
    and features that are computed once, which are the same bit for bit."""
    folder = tmp_path_factory.mktemp("smoke")
    quick = ("--max_steps", "100", "--cache_features", str(folder / "features"))
    return folder, run_script(ROOT / "train_with_eval_FINAL.sh", "--smoke", *quick, folder=folder, PYTHON=warm)


@pytest.fixture()
def checkpoint(trained, tmp_path):
    """A copy of what `trained` ended with, to spoil."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in trained.iterdir():
        if file.is_file() and file.name != vqa.MANIFEST_FILE:  # which would tell that something was changed
            shutil.copy(file, folder)
    return folder


@pytest.fixture()
def no_weights(monkeypatch):
    """Fails the test where weights would be loaded; on the meta device only their headers are read."""
    load = vqa.load_model

    def headers_only(*args, **kwargs):
        return load(*args, **kwargs) if kwargs.get("device") == "meta" else pytest.fail("weights were loaded")

    monkeypatch.setattr(vqa, "load_model", headers_only)


@pytest.fixture()
def evaluate(tmp_path, trained, capsys):
    """Runs evaluate_checkpoint.py in this process; rows and summary are None where they were not written."""

    def run(*more, checkpoint=trained, name="x", data=EVAL_DATA):
        path = tmp_path / f"{name}.jsonl"
        subject = ["--checkpoint_path", checkpoint] if checkpoint else []
        argv = map(str, [*subject, *data, "--max_new_tokens", "4", "--output_file", path, *more])
        capsys.readouterr()
        status = ev.main([*argv])
        summary = path.with_suffix(".summary.json")
        return SimpleNamespace(
            **dict(zip(("out", "err"), capsys.readouterr(), strict=True)),
            path=path,
            status=status,
            rows=[without_time(row) for row in read_jsonl(path)] if path.exists() else None,
            summary=json.loads(summary.read_text()) if status != 2 and summary.exists() else None,
        )

    return run


@pytest.fixture()
def data(tmp_path):
    """A private copy of the fixture data: paths, flags, and a function that rewrites the rows."""
    shutil.copytree(FIXTURES / "frames", tmp_path / "frames")
    shutil.copytree(FIXTURES / "audio", tmp_path / "audio")
    path, frames, audio = tmp_path / "data.jsonl", tmp_path / "frames", tmp_path / "audio"
    shutil.copy(FIXTURES / "smoke.jsonl", path)
    media = ("--frames_dir", str(frames), "--audio_dir", str(audio))

    def rewrite(change):
        """Replace the rows by `change(rows)`; a row may be a dict, or a str written as it is."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in change(read_jsonl(path))]
        path.write_text("\n".join(lines) + "\n")

    return SimpleNamespace(jsonl=path, frames=frames, audio=audio, args=(path, frames, audio), rewrite=rewrite,
                           train_flags=("--train_data_path", str(path), *media),
                           eval_flags=("--eval_data_path", str(path), *media))  # fmt: skip
