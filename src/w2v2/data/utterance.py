"""What a lhotse cut tells of an utterance, and cuts of files: the one place that knows what is kept where in a cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from w2v2.data.storage import is_remote
from w2v2.errors import JobError

if TYPE_CHECKING:
    from lhotse import MonoCut, Recording


TEXT = "text"
"""The label that an utterance has without any other: its transcript."""
ID = "id"
"""The label by which what is kept elsewhere is found."""


_Whole = Annotated[int, Meta(ge=0, le=1 << 53)]
_Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class _Supervision(TypedDict, total=False):
    text: str | None
    speaker: str | None


class _Source(TypedDict):
    source: str


class _Recording(TypedDict):
    sources: Annotated[list[_Source], Meta(min_length=1)]
    sampling_rate: Annotated[int, Meta(ge=1, le=1 << 31)]
    num_samples: _Whole


_Custom = TypedDict(
    "_Custom",
    {
        "unreadable": str,
        "ctc_infeasible": bool,
        "pass": _Whole | None,
        "shard_offset": _Whole,
        "shard_bytes": _Whole,
        "channel": _Whole | None,
        "gain": float,
    },
    total=False,
)


class Line(msgspec.Struct, frozen=True):
    """What a line of a manifest must have."""

    id: str
    start: _Seconds
    duration: _Seconds
    supervisions: Annotated[list[_Supervision], Meta(min_length=1)]
    recording: _Recording
    custom: _Custom | None = None


_decoder = msgspec.json.Decoder(Line)


def read_line(line: bytes, where: str = "a manifest") -> Line:
    """Read a line of a manifest.

    Raises:
        JobError: it is none.
    """
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise JobError(f"{where} is damaged ({error}); copy it again, or prepare the corpus again") from None


@dataclass(frozen=True)
class Utterance:
    """A cut, read out."""

    id: str
    seconds: float
    text: str | None
    """Transcript as it is; None: none."""
    speaker: str | None
    unreadable: str
    """What is wrong with the header of its file; empty: nothing."""
    ctc_infeasible: bool
    """Whether its characters were found to be more than CTC can emit in its frames."""
    repeats: int | None
    """How many times it has come before, where that is not the number of passes."""
    shard: tuple[str, int, int] | None
    """Location of a tar, and where in it the encoded audio lies: offset and size, bytes. None: in a file of its own."""

    @classmethod
    def of(cls, cut: MonoCut) -> Utterance:
        """Read a cut of one supervision."""
        supervision = cut.supervisions[0]
        return cls._read(cut.id, cut.duration, supervision.text, supervision.speaker, cut.custom, location_of(cut))

    @classmethod
    def from_line(cls, line: bytes, tar: str = "") -> Utterance:
        """Read a line of a manifest, which takes less than to make a cut of it; ``tar`` as of :func:`read_cut`."""
        cut = read_line(line)
        supervision = cut.supervisions[0]
        return cls._read(cut.id, cut.duration, supervision.get("text"), supervision.get("speaker"), cut.custom, tar)

    @classmethod
    def _read(
        cls, name: str, seconds: float, text: str | None, speaker: str | None, custom: Any, location: str
    ) -> Utterance:
        custom = custom or {}
        return cls(
            id=name,
            seconds=seconds,
            text=text,
            speaker=speaker,
            unreadable=custom.get("unreadable", ""),
            ctc_infeasible=custom.get("ctc_infeasible", False),
            repeats=custom.get("pass"),
            shard=(location, custom["shard_offset"], custom["shard_bytes"]) if "shard_offset" in custom else None,
        )


def read_cut(line: bytes, tar: str = "") -> MonoCut:
    """The cut that a line of a manifest is; ``tar`` is where its audio lies, which manifests do not say."""
    from lhotse.serialization import deserialize_item

    try:
        values = msgspec.json.decode(line)
        if tar:
            values["recording"]["sources"][0]["source"] = tar
        cut: MonoCut = deserialize_item(values)
    except Exception as error:  # lhotse checks nothing, and what is no UTF-8 may stand where nothing else looks
        raise JobError(f"a manifest holds what is no cut: {type(error).__name__} {error}; prepare it again") from error
    return cut


def location_of(cut: MonoCut) -> str:
    """Path or URL of the file, or of the tar, that holds the audio."""
    location: str = cut.recording.sources[0].source
    return location


def file_cut(
    name: str,
    location: str,
    *,
    rate: int,
    channels: int,
    total: int,
    text: str | None,
    speaker: str | None,
    recording: str | None = None,
    first: int = 0,
    samples: int | None = None,
    channel: int | None = None,
    **marks: Any,
) -> MonoCut:
    """A cut of a file, here or remote.

    Args:
        name: utterance id.
        location: path or URL.
        rate: Hz.
        total: samples of each channel in the file.
        recording: id of the file; None: ``name``.
        first, samples: which of the samples; all from the first on by default.
        channel: that is heard, from 1; None: the mean over all.
        marks: ``unreadable`` and ``ctc_infeasible``, as of :class:`Utterance`; empty ones are left out.
    """
    from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

    numbers, identity = list(range(channels)), recording or name
    duration = ((total - first) if samples is None else samples) / rate
    source = AudioSource(type="url" if is_remote(location) else "file", channels=numbers, source=location)
    custom = {key: value for key, value in {**marks, "channel": channel}.items() if value}
    return MonoCut(
        id=name,
        start=first / rate,
        duration=duration,
        channel=(channel or 1) - 1,
        recording=Recording(identity, [source], rate, total, total / rate, channel_ids=numbers),
        supervisions=[SupervisionSegment(name, identity, 0.0, duration, text=text, speaker=speaker)],
        custom=custom or None,
    )


def labelled(cut: MonoCut, label: str) -> MonoCut:
    """The cut, with another label of its supervision as text: ``speaker``, ``language``, or one of lhotse's custom."""
    from lhotse import fastcopy

    if label == TEXT:
        return cut
    (supervision,) = cut.supervisions
    text = getattr(supervision, label, None)
    return fastcopy(cut, supervisions=[fastcopy(supervision, text=None if text is None else str(text))])


def repeated(cut: MonoCut, repeats: int) -> MonoCut:
    """The cut, as one that has come so many times before."""
    from lhotse import fastcopy

    return fastcopy(cut, custom={**(cut.custom or {}), "pass": repeats})


def in_shard(cut: MonoCut, recording: Recording, offset: int, size: int, gain: float) -> MonoCut:
    """The cut, as one whose audio of a single channel lies in a tar: ``size`` bytes from ``offset`` on.

    Args:
        gain: that its samples were multiplied by, to be within -1 and 1.
    """
    from lhotse import fastcopy

    custom = {name: value for name, value in (cut.custom or {}).items() if name != "channel"}
    if gain != 1.0:
        custom["gain"] = gain
    custom |= {"shard_offset": offset, "shard_bytes": size}
    return fastcopy(cut, start=0.0, duration=recording.duration, channel=0, recording=recording, custom=custom)
