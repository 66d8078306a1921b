"""PAD apart from EOS, spare and new rows, and every id that ends a turn."""

import json
import shutil

import pytest
import torch

import train_vqa as vqa
from tests.conftest import FULL_SIZE, TINY


@pytest.fixture()
def variant(tmp_path):
    """A copy of the tiny model whose tokenizer_config and config are changed."""

    def make(tokens=None, config=None):
        folder = tmp_path / "model"
        shutil.copytree(TINY, folder)
        for name, changes in (("tokenizer_config.json", tokens or {}), ("config.json", config or {})):
            stored = json.loads((folder / name).read_text())
            stored.update(changes)
            (folder / name).write_text(json.dumps(stored))
        return folder

    return make


def test_pad_equal_to_eos_gets_a_token_of_its_own(capsys):
    tokenizer = vqa.load_tokenizer(TINY)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 497)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 480)
    assert capsys.readouterr().out == (
        "🔧 Setting dedicated pad token (was same as EOS)\n"
        "   PAD token: '<|pad|>' (ID: 497)\n"
        "   EOS token: '<|endoftext|>' (ID: 480)\n"
    )


def test_no_pad_gets_a_token_of_its_own(variant, capsys):
    tokenizer = vqa.load_tokenizer(variant({"pad_token": None}))
    assert tokenizer.pad_token_id == 497
    assert capsys.readouterr().out.startswith("🔧 Setting dedicated pad token (there was none)\n")


def test_sound_pad_is_left_alone(variant, capsys):
    tokenizer = vqa.load_tokenizer(variant({"eos_token": "<|im_end|>"}))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (480, 482)
    assert "<|pad|>" not in tokenizer.get_vocab()
    assert capsys.readouterr().out == ""


def test_a_saved_tokenizer_is_not_changed_again(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path)
    again = vqa.load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.pad_token_id == 497
    assert capsys.readouterr().out == ""


def test_real_ids():
    tokenizer = vqa.load_tokenizer(FULL_SIZE)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|audio_pad|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151652, 151655, 151657]
    assert tokenizer.pad_token_id == 151660
    assert vqa.turn_end_ids(tokenizer) == [151643, 151645]


def test_audio_pad_is_added_where_the_tokenizer_has_none(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "model" / name
        path.write_text(path.read_text().replace("<|audio_pad|>", "<|other|>"))
    tokenizer = vqa.load_tokenizer(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids(["<|audio_pad|>", "<|pad|>"]) == [497, 498]
    assert "<|vision_start|>" in tokenizer.all_special_tokens  # kept special


def test_spare_rows_are_used_and_none_is_cut(base):
    assert base.get_input_embeddings().num_embeddings == 512
    assert base.lm_head.out_features == 512


def test_without_spare_rows_the_embedding_grows_by_what_is_needed(variant, tokenizer, base):
    folder = variant(config={"vocab_size": 497})
    model = vqa.load_model(folder, tokenizer, init="random", seed=1, dtype=torch.float32)
    assert model.get_input_embeddings().num_embeddings == 498
    assert model.lm_head.out_features == model.config.text_config.vocab_size == 498
    for matrix in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert torch.equal(matrix[497], matrix[:497].mean(dim=0))
        assert not matrix.requires_grad


def test_generation_stops_at_every_turn_end(base, tokenizer):
    assert vqa.turn_end_ids(tokenizer) == [480, 482]
    assert base.generation_config.eos_token_id == [480, 482]
    assert base.generation_config.pad_token_id == 497


def test_turn_ends_hold_the_tokenizers_own_eos_and_a_sound_pad(variant):
    tokenizer = vqa.load_tokenizer(variant({"eos_token": "<|audio_end|>"}))
    assert vqa.turn_end_ids(tokenizer) == [480, 482, 496]


def test_config_and_tokenizer_that_disagree_are_refused(variant, tokenizer):
    folder = variant(config={"audio_token_id": 495})
    with pytest.raises(vqa.VQAError, match=r"audio_token_id 495, the tokenizer has <\|audio_pad\|> as 494"):
        vqa.load_model(folder, tokenizer, init="random", dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "--model_name_or_path no/such/folder: no such folder, and not to be had from the hub"),
        ("nobody-has-this/model", "--model_name_or_path nobody-has-this/model: no such folder, and not to be had"),
    ],
)
def test_a_model_that_is_nowhere_is_named(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(vqa.VQAError) as error:
        vqa.load_tokenizer(name)
    assert str(error.value).startswith(message)
