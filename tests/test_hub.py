"""The model card, uploading to the Hugging Face hub, and using what lies there, against a stand-in for its API."""

import json
import re
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import evaluate_checkpoint as ev
import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from tests import hub as stand_in
from tests.conftest import EVAL_DATA, FIXTURES, SIX_STEPS, refusal
from tests.hub import TOKEN

MODEL = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "tokenizer.json"}
MODEL |= {"tokenizer_config.json", "training_digests.dat", "vqa_settings.json"}
ONE_STEP = ("--max_steps", "1", "--save_strategy", "no", "--push_to_hub", "True")


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    """The hub, and this process as one of its users: with a token, and an empty cache."""
    with stand_in.running() as hub:
        pattern = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": pattern, "HF_HUB_DISABLE_XET": True}
        settings |= {"HF_HUB_CACHE": str(tmp_path / "hub_cache"), "HF_TOKEN_PATH": str(tmp_path / "none")}
        for name, value in (settings | {"HF_HUB_OFFLINE": False}).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.mark.slow
def test_each_save_and_the_final_model_arrive_and_are_evaluated(
    train, tiny, tmp_path, hub, evaluate, monkeypatch, capsys
):
    """From a base on the hub; checkpoints go to `last-checkpoint` too, from which a run resumes. Beside the model
    nothing is uploaded, and the token lies in no file, here or there."""
    monkeypatch.delenv("HF_TOKEN")
    hub.repos["me/base"] = [{file.name: file.read_bytes() for file in tiny.iterdir()}]
    shown = []
    monkeypatch.setattr(vqa.PeakMemory, "on_train_begin", lambda self, args, *_, **__: shown.append(args.to_dict()))
    out = tmp_path / "out"
    push = ("--push_to_hub", "True", "--hub_model_id", "vqa", "--hub_strategy", "checkpoint", "--hub_token", TOKEN)
    push += ("--model_name_or_path", "me/base", "--save_steps", "4")
    assert train(out, *SIX_STEPS, *push) == 0
    assert hub.messages == ["checkpoint-4", "checkpoint-6", "Final model"]
    assert re.findall(r"Uploaded \S+: (\S+)", capsys.readouterr().out)[-1] == f"{hub.url}/me/vqa/commit/{3:040x}"
    _, step_4, _, final = hub.repos["me/vqa"]
    last = {name.removeprefix("last-checkpoint/") for name in final} - MODEL
    assert last == {*vqa.RESUME_FILES, "rng_state.pth"} - MODEL
    assert {name for name in final if "/" not in name} == MODEL
    for name in MODEL - {"README.md", "manifest.json"}:
        assert final[name] == (out / name).read_bytes()
    assert step_4["adapter_model.safetensors"] == (out / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
    on_disk = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*on_disk, *hub.lfs.values(), *final.values()])
    # What loggers are told of a run
    assert shown[0]["vqa"]["input"]["max_image_size"] == 56 and shown[0]["hub_token"] == "<HUB_TOKEN>"
    # The base, by its id
    adapter = json.loads(final["adapter_config.json"])
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/base", f"{0:040x}")
    card = ModelCard(final["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("me/base", "adapter")
    assert 'vqa.load_trained("me/vqa"' in card.text and '"types": {"nbi_status": 2, "scope_motion_type": 2' in card.text

    # Evaluation takes the download; an earlier commit; and without a network what it has
    near, far = (evaluate(checkpoint=folder, name=name) for folder, name in ((out, "near"), ("me/vqa", "far")))
    assert near.status == far.status == 0, far.err
    assert [row["predicted_answer"] for row in near.rows] == [row["predicted_answer"] for row in far.rows]
    old = vqa.resolve_model_dir(f"me/vqa@{1:040x}", weights=True)
    assert (old / "adapter_model.safetensors").read_bytes() == step_4["adapter_model.safetensors"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert vqa.load_trained("me/vqa").merged

    # What lies in last-checkpoint is complete
    folder = tmp_path / "last-checkpoint"
    folder.mkdir()
    for name, content in final.items():
        if name.startswith("last-checkpoint/"):
            (tmp_path / name).write_bytes(content)
    assert vqa.find_damage(folder, vqa.RESUME_FILES) is None


def test_a_connection_that_breaks_leaves_the_model_on_disk(train, tmp_path, hub, monkeypatch, capsys):
    """One line and status 1; the line has a command that uploads it later."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits 1, 2, 4, 8 and 8 s between tries
    hub.breaks = True
    out = tmp_path / "out"
    assert train(out, *ONE_STEP) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: me/out: {out} was not uploaded (")
    assert hub.repos == {"me/out": [{}]} and vqa.find_damage(out) is None and vqa.load_trained(out).merged
    hub.breaks = False
    exec(re.search(r'python -c "(.*)"', line)[1])
    assert hub.repos["me/out"][-1].keys() == MODEL


@pytest.mark.parametrize("what", ["no token", "wrong token", "refused", "read only", "no network", "offline"])
def test_what_cannot_be_uploaded_is_told_before_data_are_read(what, argv, tmp_path, hub, monkeypatch):
    name, said = "me/vqa", {
        "no token": "me/vqa: cannot be uploaded to (Token is required",
        "wrong token": "me/vqa: cannot be uploaded to (Invalid user token",
        "refused": "theirs/vqa: cannot be uploaded to (You don't have the rights to create theirs/vqa); check the name",
        "read only": "theirs/vqa: cannot be uploaded to (Forbidden: you may not write to theirs/vqa)",
        "no network": "Connection refused",
        "offline": "offline mode is enabled",
    }[what]  # fmt: skip
    if what == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif what == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_another")
    elif what in ("refused", "read only"):
        name = "theirs/vqa"
        hub.repos |= {name: [{}]} if what == "read only" else {}
    elif what == "no network":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = argv(tmp_path / "out", *ONE_STEP, "--hub_model_id", name, "--train_data_path", tmp_path / "none.jsonl")
    message = refusal(vqa.main, line)
    assert said in message and "\n" not in message
    assert hub.messages == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--hub_model_id me/vqa", "--hub_model_id needs --push_to_hub True"),
        ("--push_to_hub True --hub_strategy every_save --save_strategy no", "--hub_strategy needs checkpoints"),
        (
            "--push_to_hub True --hub_token x --report_to tensorboard",
            "--hub_token: tensorboard may keep the command line",
        ),
    ],
)
def test_flags_that_contradict_each_other(flags, said, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(vqa, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert said in refusal(vqa.parse_arguments, argv(tmp_path, *flags.split()))


def test_uploading_a_folder_later(trained, hub, monkeypatch):
    """Another model that was there goes, other files stay; what a .gitignore leaves out is told."""
    hub.repos["me/vqa"] = [{"config.json": b"{}", "model-00001-of-00002.safetensors": b"", "notes.txt": b"mine"}]
    vqa.upload(trained, "me/vqa")
    assert hub.repos["me/vqa"][-1].keys() == MODEL | {"notes.txt"}
    assert b'load_trained("me/vqa"' in hub.repos["me/vqa"][-1]["README.md"]
    assert vqa.open_repo("vqa", revision="dev") == "me/vqa"
    vqa.upload(trained, "me/vqa", revision="dev", message="Again")
    assert [f"POST /api/models/me/vqa/{what}/dev" in hub.asked for what in ("branch", "commit")] == [True, True]
    hub.ignored = {"vqa_settings.json"}
    del hub.repos["me/vqa"][-1]["vqa_settings.json"]
    assert "vqa_settings.json did not arrive" in refusal(vqa.upload, trained, "me/vqa")
    assert refusal(vqa.upload, FIXTURES, "me/vqa").endswith("the save did not end; nothing was uploaded")


def test_a_checkpoint_takes_the_place_of_the_one_before(trained, hub):
    """Which more ranks may have written."""
    vqa.upload(trained / "checkpoint-2", "me/vqa", resumable=True)
    files = set(hub.repos["me/vqa"][-1])
    hub.repos["me/vqa"][-1]["last-checkpoint/optimizer_1.pt"] = b"of a second rank"
    vqa.upload(trained / "checkpoint-4", "me/vqa", resumable=True)
    assert files == hub.repos["me/vqa"][-1].keys()


def test_other_ranks_upload_nothing(hub):
    args = SimpleNamespace(process_index=1, world_size=1, hub_strategy="every_save")
    trainer = SimpleNamespace(args=args, stop_signal=vqa.StopSignal(), guard=SimpleNamespace())
    vqa.Uploader(trainer).on_save(args, SimpleNamespace(global_step=2), None)
    assert hub.asked == []


def test_a_card_without_a_base_id_says_so(trained, checkpoint):
    """And is never null, nor a local path; people may fill it in, which is no damage."""
    text = (trained / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == "FILL-IN/HUB-ID-OF-THE-BASE"
    assert card.data.license == "unknown" and "(fill in)" in card.text and "For research only" in card.text
    assert 'device="cuda", model_name_or_path="FILL-IN/HUB-ID-OF-THE-BASE")' in card.text
    assert "null" not in text and str(FIXTURES.parent) not in text and "/tmp" not in text
    assert (trained / "checkpoint-2" / "README.md").read_text() == text
    vqa.write_manifest(checkpoint)
    (checkpoint / "README.md").write_text("filled in")
    assert vqa.find_damage(checkpoint) is None


def test_figures_are_added_to_the_card(trained, evaluate, hub, tmp_path, monkeypatch):
    """Beside those of other files, in place of older ones of the same; what people wrote into the card stays."""
    vqa.upload(trained, "me/vqa")
    files = hub.repos["me/vqa"][-1]
    files["README.md"] = files["README.md"].replace(b"license: unknown", b"license: mit")
    assert evaluate("--push_results", "me/vqa").status == 0
    (tmp_path / "data").mkdir()
    other = tmp_path / "data" / "other.jsonl"
    other.write_bytes((FIXTURES / "smoke.jsonl").read_bytes())
    data = ("--eval_data_path", str(other), *EVAL_DATA[2:])
    done = evaluate("--push_results", "me/vqa", "--limit", "3", data=data, name="other")
    assert done.status == 0, done.err
    again = ["--score_only", "--output_file", str(done.path), "--eval_data_path", str(other)]
    assert ev.main([*again, "--push_results", "me/vqa"]) == 0
    assert hub.messages[1:] == ["Results of smoke.jsonl", "Results of other.jsonl", "Results of other.jsonl"]
    text = hub.repos["me/vqa"][-1]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "mit" and "## To fill in" in text and "None here yet" not in text
    results = {(result.dataset_name, result.metric_name): result for result in card.data.eval_results}
    assert results.keys() == {(name, metric) for name in ("smoke.jsonl", "other.jsonl") for metric in ev.METRICS}
    choice, figures = results["other.jsonl", "choice"], done.summary["metrics"]["choice"]
    assert (choice.metric_value, choice.metric_args["ci95"]) == (figures["accuracy"], figures["ci95"])
    assert choice.metric_args["chance"] == done.summary["baselines"]["chance"] and choice.dataset_args["rows"] == 3
    assert re.findall("^### (.*)", text, re.M) == ["smoke.jsonl", "other.jsonl"]
    assert "    Accuracy in %, of all 3 rows" in text
    assert hub.repos["me/vqa"][-1].keys() == MODEL

    hub.repos["me/other"] = [hub.repos["me/vqa"][-1] | {"manifest.json": b'{"files": {}}'}]
    swapped = evaluate("--push_results", "me/other", name="swapped")
    assert swapped.status == 2 and "me/other: holds another adapter than the one" in swapped.err
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    refused = evaluate("--push_results", "me/vqa", name="refused")
    assert refused.status == 2 and "Invalid user token" in refused.err and refused.rows is None
    none = evaluate("--push_results", "me/none", name="none")
    assert none.status == 2 and "--push_results me/none: its card and manifest cannot be had" in none.err
    assert ev.main(["--compare", "me/vqa", "me/other"]) == 2


def test_the_page_of_all_rows_goes_beside_the_card(trained, evaluate, hub, tmp_path, data):
    """As it is on disk; one that holds frames and speech is refused, and figures that there cannot be, before any row
    is answered."""
    vqa.upload(trained, "me/vqa")
    page = tmp_path / "page.html"
    push = ("--push_results", "me/vqa", "--report", page)
    embedded = evaluate(*push, "--embed_media")
    assert embedded.status == 2 and "--push_results: --embed_media puts frames and speech" in embedded.err
    data.rewrite(lambda rows: [{**rows[0], "answer": None}, *rows[1:]])
    bare = evaluate(*push, "--limit", "1", data=data.eval_flags)
    assert bare.status == 2 and "has a gold answer; there are no figures" in bare.err
    assert embedded.rows is bare.rows is None and not page.exists() and len(hub.messages) == 1
    done = evaluate(*push)
    assert done.status == 0 and "Uploaded README.md and results/smoke.html: " in done.out
    files = hub.repos["me/vqa"][-1]
    assert files.keys() == MODEL | {"results/smoke.html"} and files["results/smoke.html"] == page.read_bytes()
    assert "[Every row](results/smoke.html)" in files["README.md"].decode()


@pytest.mark.slow
def test_adapters_on_the_hub_are_trained_on_and_merged(trained, argv, hub, tmp_path, tiny):
    vqa.upload(trained, "me/vqa")
    model_args, *_ = vqa.parse_arguments(argv(tmp_path / "out", "--adapter_path", "me/vqa"))
    assert vqa.hub_origin(model_args.adapter_path) == {"hub_id": "me/vqa", "revision": f"{1:040x}"}
    merged = tmp_path / "merged"
    flags = ["--stage1_model_path", tiny, "--stage2_adapter_path", "me/vqa", "--output_path", merged]
    assert merge.main([*map(str, flags), "--dtype", "float32"]) == 0
    assert ModelCard((merged / "README.md").read_text()).data.base_model_relation == "finetune"
    vqa.upload(merged, "me/merged")
    assert vqa.load_trained("me/merged").base_fingerprint == vqa.load_trained(merged).base_fingerprint
    for flag in ("--stage2_adapter_path", "--checkpoint_path"):
        with pytest.raises(vqa.VQAError, match=f"{flag} me/none: no such folder, and not to be had from the hub"):
            vqa.resolve_model_dir("me/none", flag_name=flag)


def test_trackio_gets_a_name_to_go_on_with(tmp_path):
    """Without one its callback logs the evaluation after training as a run of its own."""
    args = vqa.VQATrainingArguments(output_dir=str(tmp_path / "mine"), report_to=["trackio"], use_cpu=True)
    assert re.fullmatch(r"mine-\d{8}-\d{6}", args.run_name)
