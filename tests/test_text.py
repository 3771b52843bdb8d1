"""Labels of every kind and script: there and back, to a file and back; what transcripts must not hold, planted."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from w2v2.decoding.greedy import Greedy
from w2v2.errors import UsageError
from w2v2.inference.words import word_times
from w2v2.serial import from_dict, to_dict
from w2v2.text.check import check_transcripts
from w2v2.text.spelling import case_of, frames_needed
from w2v2.text.vocabulary import PhonemeVocabulary, PieceVocabulary, Vocabulary, load_vocabulary
from w2v2.training.config import FinetuneConfig
from w2v2.training.units import Characters, Phonemes, SentencePieces

TEXTS = ["the cat sat on the mat", "a dog and a cat ran", "the man had a hat", "on and on the dog ran"] * 4


@pytest.fixture(scope="module")
def pieces() -> PieceVocabulary:
    return SentencePieces(size=40).vocabulary(TEXTS)


@given(st.text(st.characters(exclude_characters="|", exclude_categories=["Cs"]), min_size=1), st.booleans())
def test_characters_of_any_script_come_back(text: str, upper: bool) -> None:
    if not text.split():
        return
    vocabulary = Characters(upper=upper).vocabulary([text])
    said = vocabulary.normalize(text)
    assert said == vocabulary.normalize(said) == unicodedata.normalize("NFC", said)
    assert vocabulary.decode(vocabulary.encode(text)) == said
    assert vocabulary.unknown not in vocabulary.encode(text)
    assert vocabulary.encode(text).count(vocabulary.boundary) == len(said.split())
    assert vocabulary.encode(text) == [i for word in said.split() for i in vocabulary.encode(word)]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1), min_size=1))
@example(["<blank>"])
@example(["a", "<blank>", "<<blank>>", "<unk>"])
def test_phonemes_of_any_spelling_come_back(labels: list[str]) -> None:
    text = " ".join(labels)
    vocabulary = Phonemes().vocabulary([text])
    assert vocabulary.decode(vocabulary.encode(text)) == vocabulary.normalize(text)
    assert len(vocabulary.encode(text)) == len(vocabulary.normalize(text).split())


@settings(max_examples=50)
@given(st.lists(st.text("thecasonmdgr", min_size=1), min_size=1))
def test_pieces_come_back_and_a_text_is_spelled_word_by_word(pieces: PieceVocabulary, words: list[str]) -> None:
    text = " ".join(words)
    assert pieces.decode(pieces.encode(text)) == text.upper() == pieces.normalize(text)
    assert pieces.encode(text) == [i for word in words for i in pieces.encode(word)]
    ids = pieces.encode(text)
    assert [pieces.decode(ids[place]) for place in pieces.words(ids)] == text.upper().split()


def test_pieces_are_of_several_characters_and_the_same_from_the_same_texts(pieces: PieceVocabulary) -> None:
    assert pieces == SentencePieces(size=40).vocabulary(TEXTS)
    assert len(pieces.labels) <= 41 and any(len(label) > 2 for label in pieces.labels[2:])
    assert len(pieces.encode("the man ran")) < len("the man ran")
    assert pieces.labels[0] == "<blank>" and pieces.encode("Q")[-1] == pieces.unknown
    with pytest.raises(UsageError, match=r"no 3 pieces can be made .*change `units.size`"):
        SentencePieces(size=3).vocabulary(TEXTS)


@pytest.mark.parametrize("units", [Characters(), Characters(upper=False), Phonemes(), SentencePieces(size=30)])
def test_a_vocabulary_of_each_kind_comes_back_from_its_file(
    units: Characters | Phonemes | SentencePieces, tmp_path: Path
) -> None:
    vocabulary = units.vocabulary([*TEXTS, "Éé 日本"])
    vocabulary.save(tmp_path / "vocab.json")
    back = load_vocabulary(tmp_path / "vocab.json")
    assert back == vocabulary and type(back) is type(vocabulary)
    assert back.encode(TEXTS[0]) == vocabulary.encode(TEXTS[0])
    config = FinetuneConfig(units=units)
    assert from_dict(json.loads(json.dumps(to_dict(config))), FinetuneConfig) == config


def test_a_file_from_before_there_were_kinds_is_characters(tmp_path: Path) -> None:
    fields = {"labels": ["_", "?", "|", "A"], "blank": 0, "unknown": 1, "boundary": 2, "silent": []}
    (tmp_path / "vocab.json").write_text(json.dumps(fields))
    assert load_vocabulary(tmp_path / "vocab.json") == Vocabulary(labels=("_", "?", "|", "A"))
    for broken in ("[]", "{}", "nothing", json.dumps({**fields, "_type": "os:path"})):
        (tmp_path / "vocab.json").write_text(broken)
        with pytest.raises(UsageError):
            load_vocabulary(tmp_path / "vocab.json")


@pytest.mark.parametrize(
    ("labels", "text", "said"),
    [
        ("ABC", "aBc", "ABC"),
        ("abc", "aBc", "abc"),
        ("abC", "aBc", "aBc"),
        ("日本", "日本a", "日本A"),
        ("éa", "E\u0301", "é"),
    ],
)
def test_text_is_spelled_in_the_case_that_the_labels_have(labels: str, text: str, said: str) -> None:
    vocabulary = Vocabulary(labels=("<pad>", "<UNK>", "|", *labels))
    assert vocabulary.normalize(text) == said


def test_the_signs_of_blank_boundary_and_unknown_cannot_be_said() -> None:
    vocabulary = Vocabulary(labels=("_", "?", "|", "A"))
    assert vocabulary.encode("_A|?") == [1, 3, 1, 1, 2]
    none = Vocabulary(labels=("_", "|", "A"), unknown=None, boundary=1)
    with pytest.raises(UsageError, match="no label for '_'; expected A"):
        none.encode("A_")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"labels": ("_", "?", "|", "A", "A")}, "labels occur twice in the vocabulary: A"),
        ({"labels": ("_", "?", "A")}, None),
        ({"labels": ("_", "?")}, "must be different ids below 2"),
        ({"labels": ("_", "?", "A"), "boundary": 0}, "must be different ids"),
    ],
)
def test_labels_that_occur_twice_and_ids_that_are_none_are_refused(fields: dict, said: str | None) -> None:
    if said is None:
        assert Vocabulary(**fields).boundary == 2
        return
    with pytest.raises(UsageError, match=said):
        Vocabulary(**fields)


@given(st.lists(st.integers(1, 3), max_size=8))
def test_ctc_needs_just_as_many_frames_as_it_is_said_to(ids: list[int]) -> None:
    """torch's loss is infinite where no path exists."""
    needed = frames_needed(ids)
    for frames, possible in ((needed, True), (needed - 1, False)):
        if frames < 1:
            continue
        log_probs = torch.zeros(frames, 1, 4).log_softmax(-1)
        loss = F.ctc_loss(log_probs, torch.tensor([ids]).long(), [frames], [len(ids)], reduction="sum")
        assert loss.isfinite().item() == possible


def test_words_of_phonemes_and_pieces_have_times(pieces: PieceVocabulary) -> None:
    ids = pieces.encode("THE CAT")
    path = [i for label in ids for i in (label, 0)]
    log_probs = F.one_hot(torch.tensor(path), len(pieces.labels)).float().mul(9).log_softmax(-1)
    words = word_times(Greedy(pieces)(log_probs), pieces, float)
    assert [word.text for word in words] == ["THE", "CAT"]
    assert 0 <= words[0].start < words[0].end <= words[1].start < words[1].end <= len(path)
    phonemes = PhonemeVocabulary.from_texts(["dʒ ɛ m"])
    found = Greedy(phonemes)(F.one_hot(torch.tensor([2, 2, 0, 3, 4]), 5).float().log_softmax(-1))
    times = [(word.text, word.start, word.end) for word in word_times(found, phonemes, float)]
    assert [text for text, *_ in times] == phonemes.decode([2, 3, 4]).split()
    assert all(start <= label < end for (_, start, end), label in zip(times, (0, 3, 4), strict=True))


GOOD = [(f"u{i}", 2.0, "SO IT GOES") for i in range(40)]
LETTERS = Vocabulary.from_texts(["SO IT GOES"])


def look(planted: list[tuple[str, float, str]], vocabulary: Vocabulary = LETTERS) -> list[str]:
    def fits(seconds: float, text: str) -> bool:
        return frames_needed(vocabulary.encode(text)) <= seconds * 50

    return check_transcripts("train", [*GOOD, *planted], vocabulary, fits, 50)


def test_sound_transcripts_give_no_line() -> None:
    assert look([]) == []


@pytest.mark.parametrize(
    ("text", "vocabulary", "said"),
    [
        (
            "SO|IT",
            LETTERS,
            "train: 3 of 43 transcripts contain |, which the vocabulary has for itself: bad0, bad1, bad2",
        ),
        ("SO <UNK>", LETTERS, "contain <unk>, which the vocabulary has for itself: bad0"),
        ("S_O", Vocabulary(labels=("_", "<unk>", "|", *"EGIOST")), "contain _, which"),
        ("日本語" * 20, LETTERS, "have characters without a label"),
        (
            "SO X",
            Vocabulary(labels=("_", "|", *"EGIOST"), unknown=None, boundary=1),
            "no unknown label stands for them",
        ),
    ],
)
def test_a_fault_that_training_cannot_go_on_with_is_refused_with_its_utterances(
    text: str, vocabulary: Vocabulary, said: str
) -> None:
    with pytest.raises(UsageError) as error:
        look([(f"bad{i}", 5.0, text) for i in range(3)], vocabulary)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_vocabulary_that_loses_something_is_found_by_its_round_trip() -> None:
    class Deaf(Vocabulary):
        def decode(self, ids):
            return super().decode(ids).replace("GO", "G")

    with pytest.raises(UsageError, match=r"back from their labels \('.+' comes back as '.+'\): "):
        look([], Deaf(labels=LETTERS.labels))


def test_what_can_be_left_out_is_counted_and_named() -> None:
    planted = [("long", 0.2, "SO IT GOES"), ("none", 2.0, " \t"), ("odd", 2.0, "SO IT GOES Ü")]
    assert look(planted) == [
        "train: 1 of 43 transcripts have characters without a label (Ü), which become unknown: odd",
        "train: 1 of 43 transcripts have more labels than CTC can emit in their frames and are left out: long",
        "train: 1 of 43 transcripts are empty and left out: none",
    ]


def test_when_nothing_fits_there_is_nothing_to_learn() -> None:
    with pytest.raises(UsageError, match=r"none of 3 transcripts can be learned, 2 have more labels .*1 are empty"):
        check_transcripts("train", [("a", 1.0, "SO"), ("b", 1.0, "IT"), ("c", 1.0, "")], LETTERS, lambda s, t: False, 3)


# --- Canonical equivalence (Unicode standard, 3.7) --------------------------------------------------------------------

FORMS = ("NFC", "NFD")
NUKTA = "\u0958\u0959\u095a\u095b\u095c\u095d\u095e\u095f"  # letters that NFC takes apart
WORDS = "\u0915\u093c\u0932\u092e \u0915\u0932 \u0916\u093c\u0941\u0926 \u0915\u093c\u094d\u0932"


def labels_of(characters: str) -> tuple[str, ...]:
    return ("<pad>", "<unk>", "|", *characters)


@pytest.mark.parametrize("form", FORMS)
def test_letters_that_nfc_takes_apart_are_their_labels(form: str) -> None:
    whole = Vocabulary(labels=labels_of(NUKTA + "\u0915\u0916\u0932\u092e\u0941\u0926\u094d"))
    text = unicodedata.normalize(form, WORDS)
    assert whole.unknown not in whole.encode(text) and not whole.strange(text)
    letters = [whole.labels[i] for i in whole.encode(text)]
    assert letters == [*"\u0958\u0932\u092e|\u0915\u0932|\u0959\u0941\u0926|\u0958\u094d\u0932|"]
    assert whole.decode(whole.encode(text)) == whole.normalize(text) == unicodedata.normalize("NFC", text)
    apart = Vocabulary(labels=labels_of("\u093c\u0915\u0916\u0932\u092e\u0941\u0926\u094d"))
    assert [apart.labels[i] for i in apart.encode(text)] == [*WORDS.replace(" ", "|"), "|"]


@pytest.mark.parametrize("form", FORMS)
def test_a_decomposed_vocabulary_spells_composed_text(form: str) -> None:
    text = unicodedata.normalize(form, "ÉTÉ Ở 각")
    decomposed = Vocabulary(labels=labels_of("".join(sorted({*unicodedata.normalize("NFD", text)} - {" "}))))
    assert "".join(decomposed.labels[i] for i in decomposed.encode(text)) == (
        unicodedata.normalize("NFD", text).replace(" ", "|") + "|"
    )
    assert decomposed.decode(decomposed.encode(text)) == decomposed.normalize(text)
    pairs = Vocabulary(labels=("<pad>", "<unk>", "|", "E\u0301", "T"))  # a label of two code points
    assert pairs.encode("ÉTÉ") == [3, 4, 3, 2] and pairs.strange("ÉTÈ") == ["È"]
    assert pairs.encode("È") == [1, 2]


def test_of_two_equivalent_labels_the_composed_one_is_meant() -> None:
    assert Vocabulary(labels=labels_of("\u212b\u00c5")).encode("\u212b") == [4, 2]
    assert Vocabulary(labels=labels_of("\u212b")).encode("\u00c5") == [3, 2]


def test_phonemes_are_matched_by_canonical_equivalence() -> None:
    nasal = PhonemeVocabulary(labels=("<pad>", "<unk>", "a\u0303", "\u00e7"))
    assert nasal.encode("\u00e3 c\u0327") == [2, 3] and not nasal.strange("\u00e3")
    assert nasal.decode([2, 3]) == "\u00e3 \u00e7"


# --- Case -------------------------------------------------------------------------------------------------------------


def test_the_case_rules_of_a_language_keep_its_letters_apart(tmp_path: Path) -> None:
    text = "I\u015f\u0131k \u0130stanbul iyi"  # Işık İstanbul iyi
    turkish = Characters(language="tr").vocabulary([text])
    assert turkish.normalize(text) == "I\u015eIK \u0130STANBUL \u0130Y\u0130" == turkish.decode(turkish.encode(text))
    assert turkish.normalize(unicodedata.normalize("NFD", text)) == turkish.normalize(text)
    lower = Vocabulary(labels=("_", "?", "|", *"\u0131i\u015fk"), language="az")
    assert lower.normalize("I\u015eIK \u0130K\u0130") == "\u0131\u015f\u0131k iki"
    german = Characters(language="de").vocabulary(["Ma\u00dfe masse"])
    assert german.normalize("Ma\u00dfe Masse") == "MA\u1e9eE MASSE"
    turkish.save(tmp_path / "vocab.json")
    assert load_vocabulary(tmp_path / "vocab.json").normalize("i\u0131") == "\u0130I"
    pieces = SentencePieces(size=12, language="tr").vocabulary(["iyi \u0131\u015f\u0131k"] * 9)
    assert pieces.normalize("i\u0131") == "\u0130I" and pieces.decode(pieces.encode("i\u0131")) == "\u0130I"
    with pytest.raises(UsageError, match="tr, az, de or none, got 'upper' and 'turkish'"):
        Characters(language="turkish").vocabulary([text])


def test_letters_that_upper_case_merges_are_named() -> None:
    text = "ma\u00dfe \u0131\u015f\u0131k \u03bb\u03cc\u03b3\u03bf\u03c2"
    vocabulary = Characters().vocabulary([text])
    lines = check_transcripts("train", [("a", 9.0, text)], vocabulary, lambda seconds, text: True, 1)
    assert lines == [
        "train: 1 of 1 transcripts have letters that a change of case makes others of (\u00df (as SS) \u0131 (as I)); "
        "`units.language` tr, az or de: a"
    ]
    kept = Characters(upper=False).vocabulary([text])
    assert check_transcripts("train", [("a", 9.0, text)], kept, lambda seconds, text: True, 1) == []


@pytest.mark.parametrize(
    ("labels", "case", "strays"),
    [
        ("abcdefghijk", "lower", ""),
        ("abcdefghijkA", "lower", "A"),
        ("ABCDEFGHIJKb\u00df", "kept", ""),
        ("ABCDEFGHIJKLMNOPQb", "upper", "b"),
        ("abcdefghijkABC", "kept", ""),
        ("\u65e5\u672c", "upper", ""),
    ],
)
def test_a_stray_capital_is_no_second_case(labels: str, case: str, strays: str) -> None:
    assert case_of(labels) == (case, strays)


def test_one_question_mark_to_validate_on_does_not_refuse_a_run() -> None:
    rows = [("u", 2.0, "SO ?")]
    lines = check_transcripts("valid", rows, LETTERS, lambda seconds, text: True, 1)
    assert lines == ["valid: 1 of 1 transcripts have characters without a label (?), which become unknown: u"]
    with pytest.raises(UsageError, match="have characters without a label"):
        check_transcripts("train", rows, LETTERS, lambda seconds, text: True, 1)
