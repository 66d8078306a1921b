"""What the tests share: importing torch and building the tiny model take seconds, so both happen once a session."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import train_vqa as vqa

FIXTURES = Path(__file__).resolve().parent / "fixtures"
TINY, FULL_SIZE = FIXTURES / "tiny_model", FIXTURES / "full_size_model"
torch.set_num_threads(1)  # with more, every operation waits for cores that other work holds


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


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny model's tokenizer after `load_tokenizer`: `<|pad|>` is 497."""
    return vqa.load_tokenizer(TINY)


@pytest.fixture(scope="session")
def base(tokenizer):
    """The tiny model with random weights, float32; tests must not change it."""
    return vqa.load_model(TINY, tokenizer, init="random", seed=1, dtype=torch.float32)


@pytest.fixture()
def fresh(tokenizer):
    """Builds a tiny model of the test's own: same weights as `base`."""
    return lambda **kwargs: vqa.load_model(
        TINY, tokenizer, **{"init": "random", "seed": 1, "dtype": torch.float32, **kwargs}
    )


@pytest.fixture(scope="session")
def rows():
    """The five fixture rows, media found and decoded."""
    return vqa.load_rows(FIXTURES / "smoke.jsonl", FIXTURES / "frames", FIXTURES / "audio")


@pytest.fixture(scope="session")
def processor(tokenizer, base):
    """Frames of at most 56 px: 4 tokens each."""
    return vqa.VQAProcessor(tokenizer, base.config, max_image_size=56)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny model with ears for 4 s (200 tokens) in place of 30 s, to be quick."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"]["max_source_positions"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture()
def data(tmp_path):
    """A private copy of the fixture data: (jsonl, frames, audio), and a function that rewrites the rows."""
    shutil.copytree(FIXTURES / "frames", tmp_path / "frames")
    shutil.copytree(FIXTURES / "audio", tmp_path / "audio")
    path = tmp_path / "data.jsonl"
    shutil.copy(FIXTURES / "smoke.jsonl", path)

    class Data:
        jsonl, frames, audio = path, tmp_path / "frames", tmp_path / "audio"
        args = (path, frames, audio)
        flags = ("--train_data_path", str(path), "--frames_dir", str(frames), "--audio_dir", str(audio))

        @staticmethod
        def rewrite(change):
            """Replace the rows by `change(rows)`; a row may be a dict, or a str written as it is."""
            stored = [json.loads(line) for line in path.read_text().splitlines()]
            lines = [row if isinstance(row, str) else json.dumps(row) for row in change(stored)]
            path.write_text("\n".join(lines) + "\n")

    return Data
