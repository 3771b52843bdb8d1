"""Transcripts as they are written, read back by parsers that know nothing of the writers."""

import html
import itertools
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from w2v2.inference.transcripts import FORMATS, Transcript, ctm_names, cues
from w2v2.inference.words import Word

CLOCK = r"(\d\d):(\d\d):(\d\d)"


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    """Words of one to a hundred characters with pauses between nothing and seconds; a frame or more to a character."""
    words: list[Word] = []
    at = 0.0
    for text in draw(st.lists(st.text("ABÄ'\"&<>-", min_size=1, max_size=100), max_size=40)):
        start = at + draw(st.sampled_from([0.0, 0.02, 0.1, 0.8, 3.0]))
        length = max(draw(st.sampled_from([0.02, 0.3, 1.0, 9.0])), 0.02 * len(text))
        step = length / len(text)
        parts = tuple(Word(c, start + i * step, start + (i + 1) * step, -0.5) for i, c in enumerate(text))
        at = start + length
        words.append(Word(text, start, at, draw(st.sampled_from([None, 0.0, -0.25, -40.0])), parts))
    seconds = at + draw(st.sampled_from([0.0, 1.0]))
    return Transcript("some where/a file.flac", seconds, " ".join(w.text for w in words), tuple(words))


def written(transcript: Transcript, ending: str, timestamps: str = "word") -> str:
    return FORMATS[ending](transcript, timestamps)


def clock(parts: tuple[str, ...]) -> float:
    hours, minutes, seconds, thousandths = map(int, parts)
    return 3600 * hours + 60 * minutes + seconds + thousandths / 1000


def check_cues(transcript: Transcript, found: list[tuple[float, float, list[str]]]) -> None:
    """What viewers need, and that nothing is lost."""
    pieces = iter([line.split() for _, _, lines in found for line in lines])
    line: list[str] = []
    for word in transcript.words:
        line = line or next(pieces)
        text, count = line.pop(0), 1
        while text != word.text:
            assert not line  # a word goes on in another line
            line = next(pieces)
            text, count = text + line.pop(0), count + 1
        assert count == 1 or len(text) > 42 or word.end - word.start > 7
    assert not line and next(pieces, None) is None
    characters = (character for word in transcript.words for character in word.characters)
    for i, (start, end, lines) in enumerate(found):
        said = list(itertools.islice(characters, sum(len(shown.replace(" ", "")) for shown in lines)))
        assert start == pytest.approx(said[0].start, abs=6e-4)
        assert start < end
        assert i == 0 or found[i - 1][1] <= start
        assert all(b.start - a.end < 0.6 for a, b in itertools.pairwise(said))
        assert len(said) == 1 or said[-1].end - start <= 7.001
        assert len(lines) <= 2 and all(len(shown) <= 42 for shown in lines)


@settings(deadline=None, max_examples=60)
@given(transcripts())
def test_srt_has_numbered_cues_that_can_be_read(transcript: Transcript) -> None:
    blocks = [block.split("\n") for block in written(transcript, "srt").strip().split("\n\n") if block]
    found = []
    for number, (head, times, *lines) in enumerate(blocks, 1):
        assert head == str(number)
        match = re.fullmatch(rf"{CLOCK},(\d\d\d) --> {CLOCK},(\d\d\d)", times)
        assert match
        found.append((clock(match.groups()[:4]), clock(match.groups()[4:]), lines))
    check_cues(transcript, found)


@settings(deadline=None, max_examples=60)
@given(transcripts())
def test_vtt_is_the_same_with_its_signs_escaped(transcript: Transcript) -> None:
    head, *blocks = written(transcript, "vtt").rstrip("\n").split("\n\n")
    assert head == "WEBVTT"
    found = []
    for times, *lines in (block.split("\n") for block in blocks):
        match = re.fullmatch(rf"{CLOCK}\.(\d\d\d) --> {CLOCK}\.(\d\d\d)", times)
        assert match
        assert not any(sign in line for line in lines for sign in "<>")
        found.append((clock(match.groups()[:4]), clock(match.groups()[4:]), [html.unescape(line) for line in lines]))
    check_cues(transcript, found)


@settings(deadline=None, max_examples=60)
@given(transcripts(), st.sampled_from(["word", "char"]))
def test_ctm_has_a_line_for_each_word_or_character(transcript: Transcript, unit: str) -> None:
    units = [u for w in transcript.words for u in ([w] if unit == "word" else w.characters)]
    lines = written(transcript, "ctm", unit).splitlines()
    assert len(lines) == len(units)
    for line, word in zip(lines, units, strict=True):
        name, channel, start, length, text, *confidence = line.split(" ")
        assert (name, channel, text) == ("a_file", "1", word.text)
        assert float(start) == pytest.approx(word.start, abs=6e-4)
        assert float(start) + float(length) == pytest.approx(word.end, abs=2e-3)
        assert len(confidence) == (word.score is not None)
        assert all(0 <= float(value) <= 1 for value in confidence)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["in/a/x.wav", "in/b/y z.wav", "stdin"], ["x", "y_z", "stdin"]),
        (["in/a/x.wav", "/in/b/x.wav", "in/b/y.v1.wav"], ["a_x", "b_x", "b_y.v1"]),
        (["/a/1/x.wav", "/b/1/x.wav", "x.wav"], ["a_1_x", "b_1_x", "x"]),
        (["a/x.wav", "a/x.flac", "a/y.wav"], ["x.wav", "x.flac", "y.wav"]),
    ],
)
def test_recordings_are_told_apart_in_a_ctm(names: list[str], expected: list[str]) -> None:
    assert ctm_names(names) == dict(zip(names, expected, strict=True))


def read_textgrid(text: str) -> tuple[float, dict[str, list[tuple[float, float, str]]]]:
    """Tiers of a TextGrid by Praat's own rule: what counts are the numbers, the strings and their order."""
    values = re.findall(r'"(?:[^"]|"")*"|<exists>|(?<=[ =])-?\d+(?:\.\d+)?(?=\s|$)', text)
    stream = iter(v[1:-1].replace('""', '"') if v.startswith('"') else v for v in values)
    assert [next(stream), next(stream)] == ["ooTextFile", "TextGrid"]
    assert float(next(stream)) == 0
    end = float(next(stream))
    assert next(stream) == "<exists>"
    tiers = {}
    for _ in range(int(next(stream))):
        assert next(stream) == "IntervalTier"
        name = next(stream)
        assert (float(next(stream)), float(next(stream))) == (0, end)
        tiers[name] = [(float(next(stream)), float(next(stream)), next(stream)) for _ in range(int(next(stream)))]
    assert next(stream, None) is None
    return end, tiers


@settings(deadline=None, max_examples=60)
@given(transcripts(), st.sampled_from(["word", "char"]))
@example(Transcript("empty.wav", 0.0, "", ()), "char")
def test_textgrid_tiers_cover_the_recording_without_gap_or_overlap(transcript: Transcript, unit: str) -> None:
    end, tiers = read_textgrid(written(transcript, "TextGrid", unit))
    assert end == pytest.approx(transcript.seconds, abs=1e-6) and end > 0
    assert set(tiers) == {"words", "characters"} if unit == "char" else {"words"}
    for name, intervals in tiers.items():
        expected = [u for w in transcript.words for u in ([w] if name == "words" else w.characters)]
        assert [text for _, _, text in intervals if text] == [word.text for word in expected]
        assert intervals[0][0] == 0 and intervals[-1][1] == end
        assert all(a[1] == b[0] for a, b in itertools.pairwise(intervals))
        assert all(start < stop for start, stop, _ in intervals)
        said = [(start, stop) for start, stop, text in intervals if text]
        assert said == [pytest.approx((word.start, word.end), abs=2e-6) for word in expected]


@settings(deadline=None, max_examples=30)
@given(transcripts())
def test_json_and_text_say_it_all(transcript: Transcript) -> None:
    plain, timed = json.loads(written(transcript, "json", "none")), json.loads(written(transcript, "json", "char"))
    assert plain["text"] == timed["text"] == transcript.text and "words" not in plain
    assert written(transcript, "json").count("\n") == 1
    assert [w["text"] for w in timed["words"]] == [w.text for w in transcript.words]
    assert ["".join(c["text"] for c in w["characters"]) for w in timed["words"]] == [w.text for w in transcript.words]
    assert written(transcript, "txt", "none") == transcript.text + "\n"
    rows = [line.split("\t") for line in written(transcript, "txt").splitlines()]
    assert [text for _, _, text in rows] == [w.text for w in transcript.words]
    assert all(float(start) <= float(end) for start, end, _ in rows)


def test_a_single_short_word_stays_long_enough_to_be_read() -> None:
    assert [(cue.start, cue.end) for cue in cues([Word("YES", 1.0, 1.04), Word("NO", 1.7, 1.74)])] == [
        (1.0, 1.7),
        (1.7, 2.7),
    ]


@pytest.mark.parametrize("timed", [True, False])
def test_a_sentence_in_a_script_without_spaces_becomes_several_cues(timed: bool) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(112))
    each = tuple(Word(c, 10 + i * 25 / 112, 10 + (i + 1) * 25 / 112) for i, c in enumerate(text))
    found = cues([Word(text, 10.0, 35.0, characters=each if timed else ())])
    assert "".join(line for cue in found for line in cue.lines) == text
    assert [len(cue.lines) for cue in found] == [1, 1, 1, 1]  # seven seconds are 31 characters
    assert (found[0].start, found[-1].end) == (10.0, 35.0)
    assert all(cue.end - cue.start <= 7 for cue in found)
    (fast,) = cues([Word(text[:84], 10.0, 16.0)])
    assert fast.lines == (text[:42], text[42:84])


def test_a_mark_stays_on_its_letter_where_a_word_is_cut() -> None:
    text = "\u0e01" * 41 + "\u0e19\u0e49" + "\u0e01" * 40  # Thai: the second of these two is a mark of tone
    assert cues([Word(text, 0.0, 5.0)])[0].lines == ("\u0e01" * 41, "\u0e19\u0e49" + "\u0e01" * 40)
