"""PAD apart from EOS, spare and new rows, and every id that ends a turn."""

import shutil

import pytest
import torch

import train_vqa as vqa
from tests.conftest import FULL_SIZE, TINY, edit_json, refusal


@pytest.fixture()
def variant(tmp_path):
    """A copy of the tiny model whose tokenizer_config and config are changed."""

    def make(tokens=None, config=None):
        folder = shutil.copytree(TINY, tmp_path / "model")
        edit_json(folder / "tokenizer_config.json", **(tokens or {}))
        edit_json(folder / "config.json", **(config or {}))
        return folder

    return make


def test_pad_equal_to_eos_gets_a_token_of_its_own_once(tmp_path, capsys):
    tokenizer = vqa.load_tokenizer(TINY)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 497)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 480)
    assert capsys.readouterr().out == (
        "🔧 Setting dedicated pad token (was same as EOS)\n"
        "   PAD token: '<|pad|>' (ID: 497)\n"
        "   EOS token: '<|endoftext|>' (ID: 480)\n"
    )
    tokenizer.save_pretrained(tmp_path)
    again = vqa.load_tokenizer(tmp_path)
    assert (again.get_vocab(), again.pad_token_id) == (tokenizer.get_vocab(), 497)
    assert capsys.readouterr().out == ""


def test_no_pad_gets_a_token_of_its_own(variant, capsys):
    assert vqa.load_tokenizer(variant({"pad_token": None})).pad_token_id == 497
    assert capsys.readouterr().out.startswith("🔧 Setting dedicated pad token (there was none)\n")


def test_sound_pad_is_left_alone(variant, capsys):
    tokenizer = vqa.load_tokenizer(variant({"eos_token": "<|im_end|>"}))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (480, 482)
    assert "<|pad|>" not in tokenizer.get_vocab() and capsys.readouterr().out == ""


def test_real_ids():
    tokenizer = vqa.load_tokenizer(FULL_SIZE)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|audio_pad|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151652, 151655, 151657]
    assert tokenizer.pad_token_id == 151660 and vqa.stop_token_ids(tokenizer) == [151643, 151645]


def test_audio_pad_is_added_where_the_tokenizer_has_none(variant):
    folder = variant()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|audio_pad|>", "<|other|>"))
    tokenizer = vqa.load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids(["<|audio_pad|>", "<|pad|>"]) == [497, 498]
    assert "<|vision_start|>" in tokenizer.all_special_tokens  # kept special


def test_spare_rows_are_used_none_is_cut_and_the_embedding_grows_by_what_is_needed(variant, tokenizer, base):
    assert base.get_input_embeddings().num_embeddings == base.lm_head.out_features == 512
    folder = variant(config={"vocab_size": 497})
    model = vqa.load_model(folder, tokenizer, init="random", seed=1, dtype=torch.float32)
    assert model.get_input_embeddings().num_embeddings == 498
    assert model.lm_head.out_features == model.config.text_config.vocab_size == 498
    for matrix in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert torch.equal(matrix[497], matrix[:497].mean(dim=0)) and not matrix.requires_grad


def test_generation_stops_at_every_stop_token(base, tokenizer, variant):
    assert vqa.stop_token_ids(tokenizer) == base.generation_config.eos_token_id == [480, 482]
    assert base.generation_config.pad_token_id == 497
    own = vqa.load_tokenizer(variant({"eos_token": "<|audio_end|>"}))  # and its PAD is sound
    assert vqa.stop_token_ids(own) == [480, 482, 496]


def test_config_and_tokenizer_that_disagree_are_refused(variant, tokenizer):
    message = refusal(vqa.load_model, variant(config={"audio_token_id": 495}), tokenizer, init="random")
    assert "audio_token_id 495" in message and "<|audio_pad|>" in message and "494" in message


@pytest.mark.parametrize("name", ["no/such/folder", "nobody-has-this/model"])
def test_a_model_that_is_nowhere_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(vqa.load_tokenizer, name).startswith(f"--model_name_or_path {name}: ")
