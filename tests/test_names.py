"""A model by any name: published layouts by folder, by name on a hub of our own on loopback, by address; in every verb.

Compared with transformers, which loads the same files by itself.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from commands import run
from conftest import RATE, WORDS, sound
from hub import GATED, Hub, hub_of
from serving import serve

import w2v2
from w2v2.checkpoint.formats import convert, read
from w2v2.errors import UsageError

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
import published  # noqa: E402 -- needs transformers

BASE, PRETRAINED, MMS = "facebook/wav2vec2-base-960h", "facebook/wav2vec2-base", "facebook/mms-1b-all"
CTC = [*((name, None) for name in published.CTC), (MMS, "deu"), (MMS, "rus")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories ``OWNER/NAME/REVISION``."""
    root = tmp_path_factory.mktemp("hub")
    published.build_all(root)
    for name in ("someone/gated", "someone/empty"):
        (root / name / "main").mkdir(parents=True)
        (root / name / "main" / "config.json").write_text("{}")
    (root / "someone/gated" / "main" / GATED).touch()
    return root


@pytest.fixture(scope="module")
def hub(root: Path) -> Iterator[Hub]:
    with hub_of(root) as server:
        yield server


@pytest.fixture(scope="module")
def env(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("cache")), "HF_TOKEN": ""}


def command(cwd, env, *words):
    done = run(words, cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def theirs(folder, language=None):
    """Extractor, model and tokenizer, loaded by transformers."""
    phonemes = "Phoneme" in (folder / "tokenizer_config.json").read_text() if "espeak" in str(folder) else False
    kind = transformers.Wav2Vec2PhonemeCTCTokenizer if phonemes else transformers.Wav2Vec2CTCTokenizer
    target = {} if language is None else {"target_lang": language}
    mismatched = {} if language is None else {"ignore_mismatched_sizes": True}
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder, **target, **mismatched).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    return extractor, model, kind.from_pretrained(folder, **target)


@torch.no_grad()
def their_log_probs(parts, audio):
    extractor, model, _ = parts
    return model(**extractor(audio, sampling_rate=RATE, return_tensors="pt")).logits.log_softmax(-1)[0]


def their_text(parts, audio):
    # Between words that a blank parts it has several spaces.
    return " ".join(parts[2].decode(their_log_probs(parts, audio).argmax(-1)).split())


@pytest.mark.parametrize(("name", "language"), CTC)
def test_log_probabilities_and_text_are_transformers_own(root, name, language):
    folder = root / name / "main"
    recognizer, parts = w2v2.load(folder, language), theirs(folder, language)
    for level in (0.3, 0.05, 0.002):  # quiet too: there it shows what is added to the variance
        audio = published.audio(level=level)
        expected = their_log_probs(parts, audio)
        assert (recognizer.emissions([torch.from_numpy(audio)])[0] - expected).abs().max() <= 1e-5
        text = recognizer(audio, RATE)
        assert text == their_text(parts, audio) and text


@pytest.mark.parametrize("name", sorted(published.NAMES.keys() - {*published.CTC}))
def test_features_of_pretraining_models_are_transformers_own(root, name):
    folder = root / name / "main"
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    model = transformers.Wav2Vec2ForPreTraining.from_pretrained(folder).eval()
    for level in (0.3, 0.002):
        audio = published.audio(level=level)
        with torch.no_grad():
            inputs = extractor(audio, sampling_rate=RATE, return_tensors="pt")
            expected = model.wav2vec2(**inputs).last_hidden_state[0]
        [features] = w2v2.extract(w2v2.load(folder), [torch.from_numpy(audio)])
        assert (features["layer_2"] - expected).abs().max() <= 1e-5 * expected.abs().max()


LOAD = """
import json
from w2v2.checkpoint.formats import read
sums = {}
for name, language in json.loads(CASES):
    state = read(name, language).state
    sums[f"{name} {language}"] = [sum(t.double().sum().item() for t in state.values()), len(state)]
print(json.dumps(sums))
"""


def test_names_of_the_hub_give_the_folders_there_and_nothing_more_is_downloaded(root, hub, env, tmp_path):
    cases = [*((name, None) for name in published.NAMES), (f"{BASE}@main", None), (MMS, "deu")]
    hub.sent.clear()
    done = run(None, tmp_path, script=f"CASES = {json.dumps(json.dumps(cases))}\n{LOAD}", env=env)
    assert done.returncode == 0, done.stderr
    sums = json.loads(done.stdout)
    for name, language in cases:
        state = read(root / name.removesuffix("@main") / "main", language).state
        assert sums[f"{name} {language}"] == [sum(t.double().sum().item() for t in state.values()), len(state)]
    assert len(hub.sent) == len({*hub.sent})  # the cache has it the second time
    unwanted = ("h5", ".txt", f"{BASE}/pytorch_model.bin", "adapter.rus.safetensors", "adapter.eng.safetensors")
    assert [file for file in hub.sent if file.endswith(unwanted)] == []
    offline = env | {"HF_HUB_OFFLINE": "1"}
    command(tmp_path, offline, "convert", MMS, "out", "--to", "ours", "--language", "deu")


# --- Eight verbs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two utterances of each split with their texts, in samples that a file keeps as they are."""
    folder = tmp_path_factory.mktemp("speech")
    for split in ("train-clean", "dev-clean", "test-clean"):
        for i in range(2):
            place = folder / split / f"s{i}" / "1"
            place.mkdir(parents=True)
            soundfile.write(place / f"{split}-{i}.wav", sound(2.0, i), RATE, "FLOAT")
            (place / f"{split}-{i}.txt").write_text(" ".join(WORDS[i : i + 2]))
    return folder


def test_transcribe_align_and_evaluate_take_a_name(root, env, speech, tmp_path):
    parts = theirs(root / BASE / "main")
    files = sorted(speech.glob("test-clean/*/*/*.wav"))
    texts = {file.stem: their_text(parts, soundfile.read(file, dtype="float32")[0]) for file in files}
    lines = command(tmp_path, env, "transcribe", BASE, speech / "test-clean").splitlines()
    assert {Path(line.split("\t")[0]).stem: line.split("\t")[1] for line in lines} == texts
    assert "SUN" in command(tmp_path, env, "align", f"{BASE}@main", files[0], "SUN MOON")
    command(tmp_path, env, "evaluate", BASE, "--data", speech, "--split", "test", "--out", "scores")
    rows = [json.loads(line) for line in (tmp_path / "scores" / "hypotheses.jsonl").read_text().splitlines()]
    assert {row["id"].rpartition("_")[2]: row["hypothesis"] for row in rows} == texts
    refused = run(["evaluate", BASE, "--data", speech], tmp_path, env=env)
    assert refused.returncode == 2 and "--out" in refused.stderr
    language = command(tmp_path, env, "transcribe", MMS, files[0], "--language", "rus")
    russian = theirs(root / MMS / "main", "rus")
    assert language.strip() == their_text(russian, soundfile.read(files[0], dtype="float32")[0])


def test_extract_convert_and_export_take_a_name(root, env, speech, tmp_path):
    from safetensors.torch import load_file

    file = sorted(speech.glob("test-clean/*/*/*.wav"))[0]
    audio = soundfile.read(file, dtype="float32")[0]
    command(tmp_path, env, "extract", PRETRAINED, file, "--out", "features")
    [features] = w2v2.extract(w2v2.load(root / PRETRAINED / "main"), [torch.from_numpy(audio)])
    [written] = [load_file(path) for path in (tmp_path / "features").glob("*.safetensors")]
    assert torch.equal(written["layer_2"], features["layer_2"])
    command(tmp_path, env, "convert", MMS, "ours", "--to", "ours", "--language", "deu")
    command(tmp_path, env, "convert", "ours", "again", "--to", "hf")
    expected = their_log_probs(theirs(root / MMS / "main", "deu"), audio)
    for folder in ("ours", "again"):
        found = w2v2.load(tmp_path / folder).emissions([torch.from_numpy(audio)])[0]
        assert (found - expected).abs().max() <= 1e-5
    assert (their_log_probs(theirs(tmp_path / "again"), audio) - expected).abs().max() <= 1e-5
    command(tmp_path, env, "export", BASE, "graph", "--to", "onnx")
    text = command(tmp_path, env, "transcribe", "graph", file).strip()
    assert text == their_text(theirs(root / BASE / "main"), audio)


def test_pretrain_and_finetune_start_from_a_name(root, env, speech, tmp_path):
    few = [word for name in ("max-steps", "val-every", "checkpoint-every") for word in (f"--train.{name}", "1")]
    few += ["--data.num-workers", "0", "--train.accumulate", "1"]
    pre = ["pretrain", "adapt", "--init-from", PRETRAINED, "--data", speech, "--out", "pre", *few]
    command(tmp_path, env, *pre)
    tune = ["finetune", "tiny_ctc", "--init-from", BASE, "--data", speech, "--out", "ctc", *few]
    command(tmp_path, env, *tune)
    for out, name in (("pre", PRETRAINED), ("ctc", BASE)):  # the first step of a warm-up hardly moves them
        ours, start = read(tmp_path / out).state, read(root / name / "main").state
        assert ours.keys() >= start.keys()
        for key, tensor in start.items():
            torch.testing.assert_close(ours[key], tensor, atol=1e-4, rtol=0)


# --- Addresses --------------------------------------------------------------------------------------------------------


def test_an_address_of_a_fairseq_file_is_downloaded_once_with_its_dictionary(root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    convert(root / "jonatasgrosman/wav2vec2-large-xlsr-53-english" / "main", tmp_path / "fairseq", "fairseq")
    with serve(tmp_path / "fairseq") as server:
        address = f"{server.url}/model.pt"
        first = w2v2.load(address)
    second = w2v2.load(address)  # nobody answers any more
    folder = w2v2.load(tmp_path / "fairseq")
    audio = [torch.from_numpy(published.audio())]
    for recognizer in (first, second):
        assert recognizer.vocabulary == folder.vocabulary
        assert torch.equal(recognizer.emissions(audio)[0], folder.emissions(audio)[0])


def test_addresses_that_give_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    with serve(tmp_path) as server:
        with pytest.raises(UsageError, match=r"cannot download http://127.*/none.pt: "):
            w2v2.load(f"{server.url}/none.pt?key=secret")
        with pytest.raises(UsageError, match=r"no \.pt file"):
            w2v2.load(f"{server.url}/page.html")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- What cannot be had -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "line"),
    [
        ("facebook/nothing", {}, "there is no facebook/nothing, neither here nor on the hub"),
        ("someone/gated", {}, "someone/gated is gated: ask for access at"),
        ("someone/empty", {}, "someone/empty has no weights: expected one of model.safetensors"),
        (f"{BASE}@v9", {}, f"{BASE} has no revision v9"),
        ("facebook/other", {"HF_HUB_OFFLINE": "1"}, "in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("facebook/other", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "in the hub's cache, and the hub cannot be reached"),
        ("nothing", {}, "expected a finished run folder"),
        ("runs/nothing.pt", {}, "expected a finished run folder"),
    ],
)
def test_names_that_lead_nowhere_are_one_line(env, tmp_path, name, more, line):
    done = run(["convert", name, "out", "--to", "ours"], tmp_path, env=env | more)
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_fine_tuning_starts_from_the_language_that_is_named(root, env, speech, tmp_path):
    words = ["finetune", "tiny_ctc", "--data", speech, "--train.max-steps", "1", "--optim.schedule.peak", "1e-9"]
    alone = run([*words, "--language", "deu"], tmp_path, env=env)
    assert alone.returncode == 2 and "--language is of the model that --init-from names" in alone.stderr
    command(tmp_path, env, *words, "--init-from", MMS, "--language", "deu", "--out", "run")
    state, german = read(tmp_path / "run").state, read(root / MMS / "main", "deu").state
    english = read(root / MMS / "main").state
    adapters = [name for name in german if "adapter" in name]
    assert any(not torch.equal(german[name], english[name]) for name in adapters)
    for name in adapters:
        torch.testing.assert_close(state[name], german[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Wav2Vec2ConformerConfig", "called 'wav2vec2-conformer', expected 'wav2vec2': its blocks are conformers"),
        ("HubertConfig", "called 'hubert', expected 'wav2vec2': HuBERT predicts clusters"),
        ("WavLMConfig", "called 'wavlm', expected 'wav2vec2': WavLM's attention has gated"),
        ("Data2VecAudioConfig", "called 'data2vec-audio', expected 'wav2vec2': data2vec has five"),
        ("Wav2Vec2BertConfig", "called 'wav2vec2-bert', expected 'wav2vec2': w2v-BERT hears mel spectra"),
    ],
)
def test_other_models_are_refused_by_name_and_why(tmp_path, kind, why):
    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=why):
        w2v2.load(tmp_path)


def test_languages_that_are_not_there(root):
    with pytest.raises(UsageError, match=r"no adapter of `language` fra in .*: expected adapter.fra.safetensors"):
        w2v2.load(root / MMS / "main", "fra")
    with pytest.raises(UsageError, match="leave `language` out"):
        w2v2.load(root / BASE / "main", "deu")
    with pytest.raises(UsageError, match="must be a code such as deu"):
        w2v2.load(MMS, "*")
