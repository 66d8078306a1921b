"""Prompt layouts, and adapters of other code: evaluated, merged and gone on from."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate_checkpoint as ev
import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from benchmarks.checkpoint_roundtrip import old_name
from tests.conftest import FULL_SIZE, IM_END, PAD, TRAIN_DATA, edit_json, refusal

# ------------------------------------------------------------------------------------ ids, with Qwen2's real vocabulary

# Pieces of the texts below as Qwen2's byte pair encoding makes them (PyPI dashscope, resources/qwen.tiktoken).
PIECES = {
    "user": 872, "\n": 198, "<": 27, "|": 91, "audio": 16736, "_b": 880, "os": 436, ">": 29, "_e": 2204, ">\n": 397,
    "Answer": 16141, " the": 279, " question": 3405, " conc": 3529, "is": 285, "ely": 974, " based": 3118, " on": 389,
    " visual": 9124, " and": 323, " audio": 7699, " evidence": 5904, ".": 13, "assistant": 77091, "system": 8948,
    "You": 2610, " are": 525, " a": 264, " helpful": 10950, " assistant": 17847, "Yes": 9454, ",": 11, " scope": 6891,
    " is": 374, " advancing": 43069, "Question": 14582, ":": 25, " Is": 2160, " N": 451, "BI": 8598, " light": 3100,
    " currently": 5023, " being": 1660, " used": 1483, "?\n": 5267, "User": 1474, " Question": 15846,
    "<|im_start|>": 151644, "<|im_end|>": 151645, "<|audio_pad|>": 151657,
}  # fmt: skip
QUESTION, ANSWER = "Is NBI light currently being used?", "Yes, the scope is advancing."
USER = [151644, 872, 198]  # <|im_start|> user \n
BOS, EOS = [27, 91, 16736, 880, 436, 91, 29], [27, 91, 16736, 2204, 436, 91, 397]  # <|audio_bos|>, <|audio_eos|>\n
AUDIO = [151657] * 1500
FRAMES = [151652, *[151655] * 168, 151653] * 8
INSTRUCTION = [16141, 279, 3405, 3529, 285, 974, 3118, 389, 279, 9124, 323, 7699, 5904, 13]
ASSISTANT = [151645, 198, 151644, 77091, 198]  # <|im_end|> \n <|im_start|> assistant \n
LEARNED = [9454, 11, 279, 6891, 374, 43069, 13, 151645]
HELPFUL = [2610, 525, 264, 10950, 17847, 13, 151645, 198, *USER]  # You are a helpful assistant . <|im_end|> \n ...
ASKED = [2160, 451, 8598, 3100, 5023, 1660, 1483, 5267]
IN_WORDS = {"plain": [14582, 25, *ASKED], "chat": [1474, 15846, 25, *ASKED]}  # Question:, User Question:
SYSTEM = [151644, 8948, 198]  # <|im_start|> system \n


class QwenPieces:
    """As much of Qwen2's tokenizer as these texts take: the longest piece first."""

    def encode(self, text, add_special_tokens, split_special_tokens):
        ids = []
        while text:
            piece = max(filter(text.startswith, PIECES), key=len)
            ids.append(PIECES[piece])
            text = text.removeprefix(piece)
        return ids

    def convert_tokens_to_ids(self, token):
        return PIECES[token]


@pytest.mark.parametrize(
    ("layout", "mode", "before_frames", "after_frames", "total"),
    [
        ("plain", "audio", [*USER, *BOS, *AUDIO, *EOS], INSTRUCTION, 2904),
        ("chat", "audio", [*USER, *BOS, *AUDIO, *EOS, *HELPFUL], INSTRUCTION, 2915 + 1),
        ("plain", "audio_text", [*USER, *BOS, *AUDIO, *EOS], [*IN_WORDS["plain"], *INSTRUCTION], 2914),
        ("chat", "audio_text", [*USER, *BOS, *AUDIO, *EOS, *HELPFUL], [*IN_WORDS["chat"], *INSTRUCTION], 2926 + 1),
        ("plain", "text", USER, [*IN_WORDS["plain"], *INSTRUCTION], 1400),
        # without speech the public scripts cut nothing off
        ("chat", "text", [*SYSTEM, *HELPFUL], [*IN_WORDS["chat"], *INSTRUCTION], 1412 + 1),
    ],
)
def test_ids_and_labels_of_both_layouts_in_every_mode(layout, mode, before_frames, after_frames, total):
    config = vqa.load_config(FULL_SIZE)
    processor = vqa.VQAProcessor(QwenPieces(), config, input_mode=mode, prompt_layout=layout)
    prompt = [*before_frames, *FRAMES, *after_frames, *ASSISTANT]
    learned = [*LEARNED, 198] if layout == "chat" else LEARNED
    sample = processor.build(QUESTION, [168] * 8, 1500, ANSWER)
    assert sample["input_ids"].tolist() == [*prompt, *learned]
    assert sample["labels"].tolist() == [-100] * len(prompt) + learned
    assert len(sample["input_ids"]) == processor.length(QUESTION, [168] * 8, 1500, ANSWER) == total
    assert processor.build(QUESTION, [168] * 8, 1500, None)["input_ids"].tolist() == prompt


def test_an_unknown_layout_is_refused(tokenizer, base):
    assert "--prompt_layout" in refusal(vqa.VQAProcessor, tokenizer, base.config, prompt_layout="bare")


# ------------------------------------------------------------------------------------------- an adapter of other code


@pytest.fixture(scope="module")
def foreign(trained, base, tiny, tmp_path_factory):
    """As the public scripts leave them, (adapter, base): 4.47's keys, PEFT's config, no settings and no tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(tiny, folder / "base")
    save_file(
        {old_name(name): p.detach().clone() for name, p in base.named_parameters()}, folder / "base/model.safetensors"
    )
    (folder / "adapter").mkdir()
    shutil.copy(trained / "adapter_config.json", folder / "adapter")
    edit_json(folder / "adapter/adapter_config.json", base_model_name_or_path=str(folder / "base"))
    tensors = load_file(trained / "adapter_model.safetensors")
    save_file(
        {old_name(name): tensor for name, tensor in tensors.items()}, folder / "adapter/adapter_model.safetensors"
    )
    return folder / "adapter", folder / "base"


@pytest.fixture()
def chat(checkpoint):
    """The same adapter with settings that say `chat`, and the fixture frames."""
    edit_json(checkpoint / vqa.SETTINGS_FILE, input={"prompt_layout": "chat", "max_eval_frames": 3})
    return checkpoint


CHAT = ("--prompt_layout", "chat", "--max_eval_frames", 3)
LIKE_TRAINED = ("--max_image_size", 56)


def test_an_adapter_without_settings_is_asked_and_then_evaluated(evaluate, foreign, chat, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ev, "read_data", lambda *_: pytest.fail("data were read"))
        for given, named in (((), CHAT[::2]), (CHAT[:2], CHAT[2:3]), (CHAT[2:], CHAT[:1])):
            refused = evaluate(*given, checkpoint=foreign[0])
            assert (refused.status, len(refused.err.splitlines())) == (2, 1)
            assert all(name in refused.err for name in named)
    result = evaluate(*CHAT, *LIKE_TRAINED, checkpoint=foreign[0])
    assert (
        result.status == 0 and "You are a helpful assistant.<|im_end|>" in result.summary["manifest"]["input"]["prompt"]
    )
    ours = evaluate(checkpoint=chat, name="ours")  # which is not asked
    assert ours.rows == result.rows and not ours.err.count("prompt_layout")
    plain = evaluate("--prompt_layout", "plain", *CHAT[2:], *LIKE_TRAINED, checkpoint=foreign[0], name="plain")
    assert plain.summary["manifest"]["sha256"]["prompt"] != result.summary["manifest"]["sha256"]["prompt"]
    mixed = evaluate("--prompt_layout", "plain", *CHAT[2:], *LIKE_TRAINED, checkpoint=foreign[0])
    assert mixed.status == 2 and "prompt_sha256" in mixed.err
    in_words = evaluate(*CHAT, *LIKE_TRAINED, "--input_mode", "text", "--limit", 1, checkpoint=foreign[0], name="text")
    prompt = in_words.summary["manifest"]["input"]["prompt"]
    assert prompt.startswith("<|im_start|>system\nYou are") and "|>User Question: {question}\nAnswer" in prompt


def test_a_base_that_is_not_here_must_be_named(evaluate, foreign, tmp_path):
    adapter = shutil.copytree(foreign[0], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/workspace/base")
    refused = evaluate(*CHAT, checkpoint=adapter)
    assert "/workspace/base" in refused.err and "--model_name_or_path" in refused.err
    assert evaluate(*CHAT, "--model_name_or_path", foreign[1], "--limit", 1, checkpoint=adapter).status == 0


def test_settings_are_not_contradicted(evaluate, trained, chat):
    assert evaluate("--prompt_layout", "plain", "--limit", 1).status == 0  # as settings from before the layouts say
    for folder, layout in ((trained, "chat"), (chat, "plain")):
        refused = evaluate("--prompt_layout", layout, checkpoint=folder, name=layout)
        assert refused.status == 2 and f"--prompt_layout {layout}" in refused.err


def test_a_merged_model_knows_its_layout_or_is_asked(evaluate, foreign, tmp_path):
    adapter, base = foreign
    paths = ["--stage1_model_path", str(base), "--stage2_adapter_path", str(adapter), "--device", "cpu"]
    paths += ["--dtype", "float32", "--output_path", str(tmp_path / "merged")]
    message = refusal(merge.main, paths)
    assert "--prompt_layout" in message and "--max_eval_frames" in message and not (tmp_path / "merged").exists()
    assert merge.main([*paths, *map(str, CHAT)]) == 0
    stored = vqa.load_settings(tmp_path / "merged")
    assert (stored["input"]["prompt_layout"], stored["input"]["max_eval_frames"]) == ("chat", 3)
    merged = evaluate(*LIKE_TRAINED, checkpoint=tmp_path / "merged", name="merged")
    alive = evaluate(*CHAT, *LIKE_TRAINED, checkpoint=adapter)
    answers = [[row["predicted_answer"] for row in run.rows] for run in (merged, alive)]
    assert answers[0] == answers[1]
    for name in (vqa.SETTINGS_FILE, vqa.MANIFEST_FILE):  # as merged elsewhere
        (tmp_path / "merged" / name).unlink()
    refused = evaluate(checkpoint=tmp_path / "merged", name="asked")
    assert refused.status == 2 and "--prompt_layout and --max_eval_frames" in refused.err
    again = evaluate(*CHAT, *LIKE_TRAINED, checkpoint=tmp_path / "merged", name="told")
    assert [row["predicted_answer"] for row in again.rows] == answers[0]


def test_merging_hands_on_settings_and_takes_no_flag_against_them(chat, tiny, tmp_path):
    paths = ["--stage1_model_path", str(tiny), "--stage2_adapter_path", str(chat), "--device", "cpu"]
    paths += ["--output_path", str(tmp_path / "out")]
    assert "--prompt_layout plain" in refusal(merge.main, [*paths, "--prompt_layout", "plain"])
    assert "--max_eval_frames 8" in refusal(merge.main, [*paths, "--max_eval_frames", "8"])
    assert merge.main(paths) == 0
    assert vqa.load_settings(tmp_path / "out")["input"]["prompt_layout"] == "chat"
    # converting what knows its layout keeps it
    again = ["--stage1_model_path", str(tmp_path / "out"), "--output_path", str(tmp_path / "again"), "--device", "cpu"]
    assert merge.main(again) == 0
    assert vqa.load_settings(tmp_path / "again")["input"]["prompt_layout"] == "chat"


def test_the_newline_after_the_stop_token_is_no_part_of_an_answer(foreign, rows):
    """The candidates' log-probabilities end with the stop token in either layout."""
    model = vqa.load_trained(foreign[0], prompt_layout="chat", max_eval_frames=3, max_image_size=56).model
    row = dataclasses.replace(rows[0], answer="Yes.")
    frames = [vqa.load_frame(path, 56) for path in row.frame_paths[:2]]
    speech = vqa.load_speech(row.audio_path)
    said = model.answer(frames, speech, max_new_tokens=2, candidates=["Yes."]).log_probs["Yes."]
    batch = vqa.VQACollator(PAD)([model.processor.make_sample(row, frames, speech, True)])
    ids = batch["input_ids"][0].tolist()
    start = batch["labels"][0].tolist().count(-100)
    assert ids[-2:] == [IM_END, 198]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits[0].log_softmax(-1)
    assert said == pytest.approx(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids) - 1)), rel=1e-4)


# ------------------------------------------------------------------------------------------- going on from an adapter


def first_loss(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"][0]["loss"]


ONE_STEP = ("--max_train_samples", 2, "--per_device_train_batch_size", 2, "--max_steps", 1, "--logging_steps", 1)
ONE_STEP += ("--lora_dropout", 0, "--save_strategy", "steps", "--save_steps", 1)


@pytest.mark.parametrize("whose", ["foreign", "ours"])
def test_a_run_goes_on_where_the_adapter_stands(train, trained, foreign, rows, tmp_path, whose):
    adapter, layout, flags = trained, "plain", ()
    if whose == "foreign":
        adapter, layout = foreign[0], "chat"
        flags = ("--init", "pretrained", "--model_name_or_path", foreign[1], "--prompt_layout", "chat")
        flags += ("--max_eval_frames", "8")
    assert train(tmp_path / "out", *flags, *ONE_STEP, "--adapter_path", adapter) == 0
    settings = vqa.load_settings(tmp_path / "out")
    assert settings["input"]["prompt_layout"] == layout
    assert settings["lora"] == {"r": 4, "alpha": 16, "dropout": 0.0}
    assert settings["started_from"]["adapter_path"] == str(adapter)

    def loss(prompt_layout):
        changes = {"prompt_layout": prompt_layout, "max_eval_frames": None} if whose == "foreign" else {}
        subject = vqa.load_trained(adapter, merge=False, max_image_size=56, **changes)
        dataset = vqa.SurgicalVQADataset(rows, subject.processor, max_train_frames=2)
        batch = vqa.VQACollator(0)([dataset[0], dataset[1]])
        return subject.model(**batch).loss.item()

    assert first_loss(tmp_path / "out") == pytest.approx(loss(layout), rel=1e-4)
    if whose == "foreign":
        assert first_loss(tmp_path / "out") != pytest.approx(loss("plain"), rel=1e-2)
    # The run that started so goes on as any other, without the flag, and what it ended with is started from again.
    more = (*flags, *ONE_STEP, "--max_steps", 2)
    assert train(tmp_path / "out", *more, "--resume_from_checkpoint", "True") == 0
    assert vqa.load_settings(tmp_path / "out")["started_from"] == settings["started_from"]
    flags = flags[:4]  # the layout is handed on
    assert train(tmp_path / "next", *flags, *ONE_STEP, "--adapter_path", tmp_path / "out") == 0
    assert vqa.load_settings(tmp_path / "next")["input"]["prompt_layout"] == layout


def test_base_and_inputs_are_handed_on_where_no_flag_says_otherwise(trained, tmp_path):
    flags = [*TRAIN_DATA, "--output_dir", str(tmp_path / "out"), "--adapter_path", str(trained)]
    model, data, _ = vqa.parse_arguments([*flags, "--max_train_frames", "3"])
    stored = vqa.load_settings(trained)
    assert (model.model_name_or_path, model.init, model.base_seed) == (
        stored["model"]["model_name_or_path"],
        "random",
        1,
    )
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (4, 16, 0.05)  # dropout is the flag's
    assert (data.max_image_size, data.max_train_frames, data.prompt_layout) == (56, 3, "plain")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--lora_r", 8), "--lora_r 8"),
        (("--lora_alpha", 32), "--lora_alpha 32"),
        (("--train_vision_tower", "True"), "--train_vision_tower"),
        (("--train_decoder", "full"), "--train_decoder full"),
        (("--prompt_layout", "chat"), "--prompt_layout chat"),
        (("--resume_from_checkpoint", "True"), "--lora_r 4"),  # it says what to go on with
        (("--adapter_path", "nowhere"), "nowhere"),
        (("--adapter_path", "BASE"), "BASE"),
        (("--adapter_path", "FOREIGN"), "--prompt_layout"),
        (("--adapter_path", "FOREIGN", "--prompt_layout", "chat"), "--max_eval_frames"),
        (("--output_dir", "ADAPTER"), "--output_dir"),
    ],
)
def test_what_contradicts_the_adapter_is_refused_before_data(
    argv, trained, foreign, tmp_path, flags, named, monkeypatch
):
    monkeypatch.setattr(vqa, "prepare_data", lambda *_: pytest.fail("data were read"))
    paths = {"BASE": str(foreign[1]), "FOREIGN": str(foreign[0]), "ADAPTER": str(trained)}
    flags = [paths.get(flag, flag) for flag in flags]
    message = refusal(vqa.main, argv(tmp_path / "out", "--adapter_path", trained, *flags))
    assert paths.get(named, named) in message


def test_another_base_than_the_adapters_is_refused(argv, trained, foreign, tmp_path):
    other = shutil.copytree(foreign[1], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors")
    flags = ("--adapter_path", trained, "--init", "pretrained", "--model_name_or_path", other, "--max_steps", 1)
    assert "another base" in refusal(vqa.main, argv(tmp_path / "out", *flags))


def test_a_layout_is_trained_said_and_kept(train, argv, evaluate, tmp_path, capsys):
    assert train(tmp_path / "out", "--prompt_layout", "chat", *ONE_STEP) == 0
    assert "Prompt layout: chat" in capsys.readouterr().out
    assert "prompt_layout" in refusal(vqa.main, argv(tmp_path / "out", *ONE_STEP, "--resume_from_checkpoint", "True"))
    result = evaluate("--limit", 1, checkpoint=tmp_path / "out")
    assert "You are a helpful assistant." in result.summary["manifest"]["input"]["prompt"]
    assert vqa.main(argv(tmp_path / "dry", *ONE_STEP, "--dry_run", "True")) == 0
    plain = capsys.readouterr().out
    assert vqa.main(argv(tmp_path / "dry", "--prompt_layout", "chat", *ONE_STEP, "--dry_run", "True")) == 0
    chat = capsys.readouterr().out
    assert "Prompt layout: plain" in plain and "Prompt layout: chat" in chat
    longest = [int(text.split("tokens per sample: min")[1].split("max ")[1].split()[0]) for text in (plain, chat)]
    assert longest[1] > longest[0]


def test_a_run_from_an_adapter_that_has_no_checkpoint_yet_does_not_resume_on_the_bare_base(train, trained, tmp_path):
    out = tmp_path / "out"
    assert train(out, *ONE_STEP, "--adapter_path", trained, "--save_strategy", "no") == 0
    for file in out.iterdir():
        if file.is_file() and file.name != vqa.STARTED_FILE:
            file.unlink()
    assert "--adapter_path" in refusal(train, out, *ONE_STEP, "--lora_r", "4", "--resume_from_checkpoint", "True")


def test_four_bits_are_handed_on_by_an_adapter(argv, trained, tmp_path):
    pytest.importorskip("bitsandbytes")
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    (adapter / vqa.MANIFEST_FILE).unlink()
    settings = vqa.load_settings(adapter)
    settings["model"]["load_in_4bit"] = True
    (adapter / vqa.SETTINGS_FILE).write_text(json.dumps(settings))
    words = argv(tmp_path / "out", "--adapter_path", adapter)
    assert vqa.parse_arguments(words)[0].load_in_4bit
    assert not vqa.parse_arguments([*words, "--load_in_4bit", "False"])[0].load_in_4bit
