"""The synthetic corpus: plan, text, speech, recording, files."""

import functools
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from w2v2.errors import UsageError
from w2v2.synthetic import corpus as synthetic
from w2v2.synthetic import espeak
from w2v2.synthetic import grammar as lexicon
from w2v2.synthetic.acoustics import draw_session, record
from w2v2.synthetic.corpus import synthesize
from w2v2.synthetic.espeak import speak
from w2v2.synthetic.speakers import ACCENTS, FAMILIES, Speaker, SyntheticConfig, plan_speakers

SMALL = SyntheticConfig(hours=0.03, valid_hours=0.01, test_hours=0.01, n_speakers=6, seed=3, jobs=1)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@functools.cache
def vocabulary() -> frozenset[str]:
    """Every word that a sentence can hold, in upper case."""
    reached, todo = set(), ["S"]
    words: set[str] = {"AN"}
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        for alternative in lexicon.rules()[name]:
            todo += re.findall(r"\{(\w+)\}", alternative)
            words.update(lexicon.transcript(re.sub(r"\{\w+\}('s)?", " ", alternative)).split())
    owners = lexicon.rules()["NAME"] + lexicon.rules()["PERSON_SG"]
    return frozenset(words | {f"{owner}'s".upper() for owner in owners})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader")
    out = tmp_path_factory.mktemp("synthetic") / "corpus"
    synthesize(out, SMALL)
    return out


@pytest.fixture(scope="module")
def utterances(corpus: Path) -> dict[str, tuple[str, list[list], np.ndarray]]:
    """Transcript, word times and 16-bit samples of every utterance."""
    found = {}
    for table in corpus.rglob("*.trans.txt"):
        times = [json.loads(line) for line in (table.parent / table.name.replace("trans.txt", "words.jsonl")).open()]
        words = {entry["id"]: entry["words"] for entry in times}
        for line in table.read_text().splitlines():
            name, text = line.split(" ", 1)
            audio, rate = soundfile.read(table.parent / f"{name}.flac", dtype="int16")
            assert rate == 16_000
            assert audio.ndim == 1
            found[name] = text, words.pop(name), audio
        assert not words
    return found


# Plan


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_splits_share_no_speaker_voice_or_family(seed: int) -> None:
    speakers = plan_speakers(SyntheticConfig(seed=seed))
    assert len(speakers) >= 80
    assert len({s.id for s in speakers}) == len(speakers)
    assert len({(s.voice, s.pitch, s.rate, s.accent) for s in speakers}) == len(speakers)
    count = Counter(s.split for s in speakers)
    assert count["valid"] >= 10
    assert count["test"] >= 10
    assert count["train"] > 50
    splits = defaultdict(set)
    for s in speakers:
        assert s.voice in FAMILIES[s.family]
        splits["family", s.family].add(s.split)
        splits["name", re.sub(r"\d+$", "", s.voice).lower()].add(s.split)
    assert all(len(found) == 1 for found in splits.values())


def test_unsuitable_voices_are_left_out() -> None:
    voices = [voice for family in FAMILIES.values() for voice in family]
    assert len(voices) == len(set(voices)) >= 70
    assert not [v for v in voices if re.search("whisper|robo|croak|demon|announcer", v.lower())]


def test_every_voice_and_accent_is_known_to_espeak() -> None:
    loader = pytest.importorskip("espeakng_loader")
    data = Path(loader.get_data_path())
    assert {voice for family in FAMILIES.values() for voice in family} <= {p.name for p in data.glob("voices/!v/*")}
    for accent in ACCENTS:
        assert speak("Hello.", voice="m1", accent=accent).audio.size > 4000


def test_seed_changes_the_plan_and_jobs_do_not() -> None:
    plan = plan_speakers(SyntheticConfig(seed=5, jobs=1))
    assert plan == plan_speakers(SyntheticConfig(seed=5, jobs=7))
    other = plan_speakers(SyntheticConfig(seed=6))
    assert [s.voice for s in plan] != [s.voice for s in other]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_speakers": 2},
        {"jobs": 0},
        {"hours": 0.01},
        {"valid_hours": float("nan")},
        {"test_hours": -1.0},
        {"hours": float("inf")},
    ],
)
def test_impossible_config_is_refused_in_one_line(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^`{next(iter(wrong))}`.* got [^\n]*$"):
        SyntheticConfig(**wrong)


# Text


def test_grammar_reaches_a_thousand_words() -> None:
    rng = np.random.default_rng(0)
    sentences = [lexicon.sentence(rng) for _ in range(2000)]
    words = Counter(word for text in sentences for word in lexicon.transcript(text).split())
    assert len(words) >= 1000
    assert set(words) <= vocabulary()
    assert all(re.fullmatch(r"[A-Z]+('[A-Z]+)*", word) for word in vocabulary())
    assert len(set(sentences)) > 1950
    lengths = [len(text) for text in sentences]
    assert np.percentile(lengths, 10) < 35
    assert np.percentile(lengths, 90) > 85
    assert not [s for s in sentences if re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouh]|[{}]|  |[^A-Za-z', .?!]", s)]


def test_a_seed_gives_the_same_sentences_for_ever() -> None:
    rng = np.random.default_rng(7)
    text = "".join(f"{lexicon.sentence(rng)}\n" for _ in range(2000))
    assert hashlib.sha256(text.encode()).hexdigest().startswith("380af6320a9f2cd2b54f9062")


def test_verb_forms_and_plurals() -> None:
    rules = lexicon.rules()
    for base, past, ing in [
        ("stop", "stopped", "stopping"), ("carry", "carried", "carrying"), ("obey", "obeyed", "obeying"),
        ("agree", "agreed", "agreeing"), ("tie", "tied", "tying"), ("write", "wrote", "writing"),
    ]:  # fmt: skip
        kind, index = next((n[:-5], r.index(base)) for n, r in rules.items() if n.endswith("_BASE") and base in r)
        assert (rules[f"{kind}_PAST"][index], rules[f"{kind}_ING"][index]) == (past, ing)
    assert {"children", "boxes", "stories", "knives", "toys"} <= {w for n, r in rules.items() if "_PL" in n for w in r}


@given(st.integers(0, 2**32), st.floats(2.0, 1000.0))
def test_targets_fit_the_bounds_and_leave_room(seed: int, remaining: float) -> None:
    target = synthetic._next_target(np.random.default_rng(seed), remaining)
    assert 2.5 <= target <= 15.5
    left = remaining - target
    assert left <= 0.5 or left >= 2.5


# Speech


def test_speech_does_not_depend_on_what_was_said_before() -> None:
    pytest.importorskip("espeakng_loader")
    voices = [voice for family in FAMILIES.values() for voice in family]
    text = "She measured this old chair, then a storm of thick rain fell."
    first = {voice: speak(text, voice=voice, rate=190, seed=4) for voice in voices}
    for voice in reversed(voices):
        speak("Why?", voice="m2", rate=150, pitch=70, seed=9)
        again = speak(text, voice=voice, rate=190, seed=4)
        assert np.array_equal(first[voice].audio, again.audio), voice
        assert first[voice].words == again.words


def test_clean_words_are_where_the_energy_is() -> None:
    pytest.importorskip("espeakng_loader")
    rng = np.random.default_rng(1)
    for speaker in plan_speakers(SyntheticConfig())[::9]:
        text = " ".join(lexicon.sentence(rng) for _ in range(3))
        speech = synthetic._speak_as(speaker, text, 1)
        assert [word for word, _, _ in speech.words] == lexicon.transcript(text).split()
        inside = np.zeros(len(speech.audio), bool)
        for _, start, end in speech.words:
            inside[int(start * 22_050) : int(end * 22_050)] = True
        power = speech.audio.astype(float) ** 2
        assert (~inside).sum() > 5000  # the pauses between the sentences
        assert power[inside].mean() > 100 * power[~inside].mean()
        assert np.abs(speech.audio).max() < 0.99  # espeak itself did not clip
        first_sound = np.flatnonzero(np.abs(speech.audio) > 0.05 * speech.audio.max())[0] / 22_050
        assert abs(speech.words[0][1] - first_sound) < 0.15


def test_a_pause_and_a_merged_pair_get_their_times() -> None:
    # "of the" has one event; the phone at 4000 is the pause after "end", before "Go" at 6000.
    events = [(0, 0, ""), (-1, 0, "'O:"), (4, 1000, ""), (-1, 1000, "V"), (11, 3000, ""), (-1, 3000, ",E")]
    events += [(-1, 4000, "_:"), (-1, 4500, "_"), (16, 6000, ""), (-1, 6000, "g"), (-1, 7000, "_")]
    words = espeak._word_times("All of the end. Go!", events, 7000)
    samples = [(word, round(start * 22_050), round(end * 22_050)) for word, start, end in words]
    assert samples == [
        ("ALL", 0, 1000),
        ("OF", 1000, 1800),
        ("THE", 1800, 3000),
        ("END", 3000, 4000),
        ("GO", 6000, 7000),
    ]
    phones = espeak._phone_times(events, 7000)
    samples = [(phone, round(start * 22_050), round(end * 22_050)) for phone, start, end in phones]
    assert samples == [("O:", 0, 1000), ("V", 1000, 3000), ("E", 3000, 4000), ("g", 6000, 7000)]


def test_missing_espeak_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UsageError, match=r"pip install espeakng-loader"):
        synthesize(tmp_path / "corpus", SMALL)
    assert not list(tmp_path.iterdir())


# Recording


def test_recording_keeps_the_words_on_the_sound() -> None:
    pytest.importorskip("espeakng_loader")
    speech = speak("My brother found a small boat near the old mill.", voice="m3")
    session = draw_session(np.random.default_rng(2))
    audio, words, phones = record(speech, session, np.random.default_rng(3), lead=0.3, tail=0.2)
    clean = soxr.resample(speech.audio, 22_050, 16_000)
    assert len(audio) == len(clean) + 8000
    size = 2 * len(audio)
    correlation = np.fft.irfft(np.fft.rfft(audio, size) * np.conj(np.fft.rfft(clean, size)))
    lag = int(np.argmax(correlation[: len(audio)])) / 16_000
    shifts = [start - clean_start for (_, start, _), (_, clean_start, _) in zip(words, speech.words, strict=True)]
    shifts += [start - clean_start for (_, start, _), (_, clean_start, _) in zip(phones, speech.phones, strict=True)]
    assert session.delay > 0
    assert shifts == pytest.approx([0.3 + session.delay] * len(shifts), abs=2e-4)
    assert lag == pytest.approx(shifts[0], abs=1e-3)


@pytest.mark.parametrize("snr_db", [10.0, 30.0])
def test_background_noise_has_the_wanted_level(snr_db: float) -> None:
    pytest.importorskip("espeakng_loader")
    speech = speak("Seven green boats sailed away before the storm.", voice="m3")
    session = replace(draw_session(np.random.default_rng(2)), snr_db=snr_db, level_db=-30.0)
    audio, words, _ = record(speech, session, np.random.default_rng(3), lead=1.0, tail=0.2)
    spoken = np.concatenate([audio[int(s * 16_000) : int(e * 16_000)] for _, s, e in words]) / 32768
    noise = audio[:15_000] / 32768
    assert 10 * np.log10(np.mean(spoken**2)) == pytest.approx(-30, abs=3)
    assert 10 * np.log10(np.mean(spoken**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=2.5)


def test_room_is_short_and_its_direct_path_dominates() -> None:
    for seed in range(20):
        session = draw_session(np.random.default_rng(seed))
        direct = round(session.delay * 16_000)
        echoes = session.impulse[direct + 1 :]
        assert session.impulse[direct] == 1
        assert not session.impulse[:direct].any()
        assert 0.01 < np.sum(echoes**2) < 0.6
        assert 0.1 <= len(echoes) / 16_000 < 0.41
        assert np.sum(echoes[-len(echoes) // 4 :] ** 2) < 0.01 * np.sum(echoes**2)


# Files


def test_layout_and_transcripts(corpus: Path, utterances: dict) -> None:
    speakers = plan_speakers(SMALL)
    names = sorted(path.name for path in corpus.iterdir())
    assert names == ["SPEAKERS.TXT", "synthetic.json", "test", "train", "valid"]
    rows = [row for row in (corpus / "SPEAKERS.TXT").read_text().splitlines() if not row.startswith(";")]
    wanted = [(s.id, s.family, s.voice, s.accent, s.pitch, s.rate, s.split) for s in speakers]
    assert [tuple(row.split(" | ")) for row in rows] == [tuple(map(str, row)) for row in wanted]
    split = {s.id: s.split for s in speakers}
    flac = sorted(corpus.rglob("*.flac"))
    assert len(flac) == len(utterances) > 15
    for path in flac:
        speaker, chapter, number = path.stem.split("-")
        assert path.relative_to(corpus).parts[:-1] == (split[int(speaker)], speaker, chapter)
        assert len(number) == 4
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
    for text, _, _ in utterances.values():
        assert re.fullmatch(r"[A-Z']+( [A-Z']+)*", text)
        assert set(text.split()) <= vocabulary()
    assert {s.id for s in speakers} == {int(name.split("-")[0]) for name in utterances}


@pytest.mark.parametrize(("target", "pace"), [(1.2, 15.0), (17.0, 15.0), (3.0, 5.0), (14.0, 40.0)])
def test_a_wrong_pace_is_corrected_within_the_bounds(target: float, pace: float) -> None:
    pytest.importorskip("espeakng_loader")
    speaker, rng = plan_speakers(SMALL)[0], np.random.default_rng(0)
    _, audio, _, _ = synthetic._utterance(speaker, draw_session(rng), rng, pace, target)
    assert len(audio) / 16_000 == pytest.approx(min(max(target, 2.5), 15.5), abs=0.8)
    assert 2 <= len(audio) / 16_000 <= 16


@pytest.mark.parametrize("unfit", ["Go.", "The storm was near the old mill. " * 10])
def test_unfit_texts_are_drawn_again_until_one_fits(unfit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader")
    fit = "My brother found a small boat near the old mill."
    texts = iter([unfit] * 12 + [fit])
    monkeypatch.setattr(synthetic, "_draw_text", lambda rng, letters: next(texts))
    speaker, rng = plan_speakers(SMALL)[0], np.random.default_rng(0)
    text, audio, _, _ = synthetic._utterance(speaker, draw_session(rng), rng, 15.0, 8.0)
    assert text == lexicon.transcript(fit)
    assert 2 <= len(audio) / 16_000 <= 16


def test_durations_hours_and_levels(corpus: Path, utterances: dict) -> None:
    seconds = Counter()
    split = {s.id: s.split for s in plan_speakers(SMALL)}
    for name, (_, _, audio) in utterances.items():
        assert 2 <= len(audio) / 16_000 <= 16
        seconds[split[int(name.split("-")[0])]] += len(audio) / 16_000
        assert np.abs(audio.astype(int)).max() < 32_000
        assert -45 < 20 * np.log10(np.std(audio / 32768)) < -14
        assert np.std(audio[:1000]) > 0  # background noise, never digital silence
    for name, (_, hours, _) in SMALL.shares().items():
        assert seconds[name] == pytest.approx(hours * 3600, rel=0.05)
    assert json.loads((corpus / "synthetic.json").read_text())["seconds"] == pytest.approx(dict(seconds), abs=0.01)
    lengths = [len(audio) / 16_000 for _, _, audio in utterances.values()]
    assert min(lengths) < 6
    assert max(lengths) > 9


def test_word_times_are_monotone_and_true(utterances: dict) -> None:
    onsets, contrasts = [], []
    for text, words, audio in utterances.values():
        assert [word for word, _, _ in words] == text.split()
        times = [time for _, start, end in words for time in (start, end)]
        assert all(b >= a - 1e-3 for a, b in pairwise(times))
        assert all(end - start > 0.02 for _, start, end in words)
        assert 0.1 <= times[0] < 0.45
        assert times[-1] <= len(audio) / 16_000
        first, power = words[0][1], audio.astype(float) ** 2
        contrasts.append(
            power[int(first * 16_000) : int(words[-1][2] * 16_000)].mean() / power[: int(first * 16_000)].mean()
        )
        envelope = np.convolve(power, np.ones(160) / 160, "same")
        onsets.append(np.flatnonzero(envelope > 0.1 * np.percentile(envelope, 90))[0] / 16_000 - first)
    assert min(contrasts) > 4
    assert np.median(np.abs(onsets)) < 0.1


def test_phones_of_a_known_word_and_where_they_are(corpus: Path, utterances: dict) -> None:
    pytest.importorskip("espeakng_loader")
    stormy = [phone for phone, _, _ in speak("storm", voice="m3", accent="en-us").phones]
    assert stormy == ["s", "t", "o@", "m"]
    energies: dict[bool, list[float]] = {True: [], False: []}
    seen = set()
    for table in corpus.rglob("*.phones.ctm"):
        rows: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for line in table.read_text().splitlines():
            name, channel, start, duration, phone = line.split(" ")
            assert channel == "1"
            assert re.fullmatch(r"[^',_\s]\S*", phone)
            rows[name].append((float(start), float(start) + float(duration), phone))
        for name, phones in rows.items():
            _, words, audio = utterances[name]
            assert all(start < end for start, end, _ in phones)
            assert all(end <= later + 1e-3 for (_, end, _), (later, _, _) in pairwise(phones))
            assert phones[0][0] == pytest.approx(words[0][1], abs=0.1)
            assert phones[-1][1] == pytest.approx(words[-1][2], abs=0.1)
            # High frequencies tell hissing sounds from vowels, whatever the voice.
            for start, end, phone in phones:
                part = np.diff(audio[int(start * 16_000) : int(end * 16_000)].astype(float))
                if phone in ("s", "S") or phone in ("i:", "A:", "oU", "a"):
                    whole = np.sum(audio[int(start * 16_000) : int(end * 16_000)].astype(float) ** 2)
                    energies[phone in ("s", "S")].append(np.sum(part**2) / whole)
            seen.add(name)
    assert seen == set(utterances)
    assert np.median(energies[True]) > 4 * np.median(energies[False])


def test_same_bytes_in_two_processes_and_in_any_order(corpus: Path, tmp_path: Path) -> None:
    fractions: list[float] = []
    synthesize(tmp_path / "parallel", replace(SMALL, jobs=2), lambda stage, share: fractions.append(share))
    assert files(tmp_path / "parallel") == files(corpus)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(fractions) >= 6
    for speaker in reversed(plan_speakers(SMALL)[-3:]):
        synthetic._write_speaker(tmp_path / "reversed", speaker, SMALL.seed)
    again = files(tmp_path / "reversed")
    assert again
    assert again.items() <= files(corpus).items()


def test_another_seed_gives_another_corpus(corpus: Path, tmp_path: Path) -> None:
    other = replace(SMALL, seed=4)
    synthetic._write_speaker(tmp_path, replace(plan_speakers(SMALL)[0], seconds=12.0), other.seed)
    ours, theirs = files(corpus), files(tmp_path)
    assert set(theirs) & set(ours)
    assert not [name for name in theirs if ours.get(name) == theirs[name]]


def test_finished_corpus_is_kept_and_anything_else_refused(corpus: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    told: list[float] = []
    synthesize(corpus, replace(SMALL, jobs=2), lambda stage, share: told.append(share))
    assert told == [1.0]
    with pytest.raises(ValueError, match=r"^[^\n]*expected [^\n]* got format 2 with [^\n]*'seed': 3[^\n]*$"):
        synthesize(corpus, replace(SMALL, seed=4))
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^[^\n]*expected [^\n]* got other files; choose [^\n]*$"):
        synthesize(tmp_path, SMALL)
    with pytest.raises(ValueError, match="got a file; choose"):
        synthesize(tmp_path / "notes.txt", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_run_leaves_nothing_and_empty_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("espeakng_loader")

    def fail_late(root: Path, speaker: Speaker, seed: int) -> float:
        (root / "half.flac").write_bytes(b"")
        if speaker.split == "test":
            raise KeyboardInterrupt
        return speaker.seconds

    (tmp_path / "corpus").mkdir()
    monkeypatch.setattr(synthetic, "_write_speaker", fail_late)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "corpus", SMALL)
    assert list(tmp_path.rglob("*")) == [tmp_path / "corpus"]
    monkeypatch.setattr(synthetic, "_write_speaker", lambda root, speaker, seed: speaker.seconds)
    synthesize(tmp_path / "corpus", SMALL)
    assert (tmp_path / "corpus" / "synthetic.json").is_file()
    assert len(list(tmp_path.iterdir())) == 1


def test_module_needs_neither_torch_nor_lightning() -> None:
    # An empty parent package, so that only what this module itself imports counts.
    code = """
import sys, types
sys.modules["w2v2"] = parent = types.ModuleType("w2v2")
parent.__path__ = [sys.argv[1]]
import w2v2.synthetic.corpus
print([name for name in sys.modules if name.split(".")[0] in sys.argv[2:]])
"""
    heavy = ["torch", "pytorch_lightning", "lightning", "lhotse", "transformers", "espeakng_loader"]
    package = str(Path(synthetic.__file__).parents[1])
    command = [sys.executable, "-c", code, package, *heavy]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
