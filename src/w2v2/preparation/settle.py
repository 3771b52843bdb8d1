"""What can be decided only once every row is known: names, duplicates, splits, speakers in two of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

from w2v2.errors import UsageError
from w2v2.preparation.journal import Journal

log = logging.getLogger(__name__)


def settle(journal: Journal, listed: Iterable[tuple[str, str]], shares: dict[str, float], seed: int) -> None:
    """Decide it anew for all rows of a journal.

    Args:
        listed: (utterance id, split); if there are any, rows that are not listed go into no split.
        shares: of speakers for ``valid`` and ``test``, taken from the rows that no list and no folder assigns.
        seed: of that choice.

    Raises:
        UsageError: the list names none of the rows.
    """
    with journal.transaction():
        _name(journal)
        journal.db.execute("DELETE FROM reasons WHERE reason IN ('duplicate', 'speaker_overlap', 'transcript_missing')")
        journal.db.execute(
            """INSERT INTO reasons SELECT id, 'transcript_missing', 'other rows have one' FROM rows
            WHERE text IS NULL AND EXISTS (SELECT 1 FROM rows WHERE text IS NOT NULL)"""
        )
        journal.db.execute("CREATE INDEX IF NOT EXISTS rows_by_content ON rows (content)")
        journal.db.execute("UPDATE rows SET before = part, part = split, held = 0")
        _list(journal, listed)
        journal.db.execute(
            """INSERT INTO reasons SELECT id, 'duplicate', 'the same samples as ' || first FROM (
                SELECT id, first_value(path || coalesce(' from ' || start || ' s', '')) OVER same AS first,
                row_number() OVER same AS nth FROM kept WHERE content != ''
                WINDOW same AS (PARTITION BY content ORDER BY path, start, stop, text, line)
            ) WHERE nth > 1"""
        )
        _divide(journal, shares, seed)
        journal.db.execute(
            """INSERT INTO reasons SELECT id, 'speaker_overlap', 'speaker ' || speaker || ' is in ' || splits
            FROM kept JOIN (
                SELECT speaker AS who, group_concat(DISTINCT part) AS splits FROM kept
                WHERE speaker IS NOT NULL GROUP BY speaker HAVING count(DISTINCT part) > 1
            ) ON speaker = who"""
        )
        journal.db.execute("UPDATE rows SET place = share(path)")
        journal.db.execute("CREATE INDEX IF NOT EXISTS rows_by_place ON rows (part, place, path, first, line)")


def _name(journal: Journal) -> None:
    """Names of rows: the utterance id; where two paths share it, the whole path; then the part and the channel."""
    journal.db.execute("UPDATE rows SET name = stem")
    journal.db.execute(
        """UPDATE rows SET name = replace(replace(public(path), '/', '_'), ' ', '_') WHERE stem IN
        (SELECT stem FROM rows GROUP BY stem HAVING count(DISTINCT path) > 1)"""
    )
    journal.db.execute(
        """UPDATE rows SET name = name || printf('-%.3f-', coalesce(start, 0))
        || CASE WHEN stop IS NULL THEN 'end' ELSE printf('%.3f', stop) END
        WHERE start IS NOT NULL OR stop IS NOT NULL"""
    )
    journal.db.execute("UPDATE rows SET name = name || '-ch' || channel WHERE channel IS NOT NULL")
    row = "path || ' ' || coalesce(start, 0) || ' ' || coalesce(stop, 'end') || ' ' || coalesce(channel, 0)"
    journal.db.execute(  # two rows may still share one, such as a/b_c.wav and a_b/c.wav
        f"""UPDATE rows SET name = name || printf('-%08x', share({row}) >> 31) WHERE name IN
        (SELECT name FROM rows GROUP BY name HAVING count(DISTINCT {row}) > 1)"""
    )


def _list(journal: Journal, listed: Iterable[tuple[str, str]]) -> None:
    journal.db.execute("CREATE TEMP TABLE listed (name TEXT PRIMARY KEY, split TEXT)")
    journal.db.executemany("INSERT OR REPLACE INTO listed VALUES (?, ?)", listed)
    if not journal.value("SELECT count(*) FROM listed"):
        journal.db.execute("UPDATE rows SET part = 'train' WHERE part IS NULL")
        return
    journal.db.execute("UPDATE rows SET part = (SELECT split FROM listed WHERE listed.name IN (rows.stem, rows.name))")
    if not journal.value("SELECT count(*) FROM rows WHERE part IS NOT NULL"):
        raise UsageError("the list of splits names no utterance of this source; its ids are the files' names")
    query = (
        "SELECT count(*), min(name) FROM listed WHERE name NOT IN (SELECT stem FROM rows UNION SELECT name FROM rows)"
    )
    vain, example = journal.db.execute(query).fetchone()
    if vain:
        count = journal.value("SELECT count(*) FROM listed")
        log.warning(
            "the list of splits names %d of %d utterances in vain, such as %s: there is no such recording",
            vain, count, example,
        )  # fmt: skip


def _divide(journal: Journal, shares: dict[str, float], seed: int) -> None:
    """Hold out whole speakers of train for each split that is missing; recordings, where there are not two.

    Without train the other splits are taken for it where folders are called so, not where a list or rows say so.

    Speakers of one recording stay together, and so do the recordings of a speaker. What was held out when the corpus
    was prepared before stays so.
    """
    if not journal.value("SELECT count(*) FROM kept WHERE part = 'train'"):
        by_hand = journal.value("SELECT count(*) FROM rows WHERE part = 'train' OR line")
        if by_hand or journal.value("SELECT count(*) FROM listed"):  # to evaluate on; or all of train is rejected
            return
        journal.db.execute("UPDATE rows SET part = 'train' WHERE part IS NOT NULL")
        log.warning("no folder is called train: the others are taken for it, and divided")
    _group(journal)
    left = 1.0
    for split, wanted in shares.items():
        if not wanted or journal.value("SELECT count(*) FROM kept WHERE part = ?", split):
            continue
        speaker = "coalesce((SELECT leader FROM leaders WHERE who = coalesce(speaker, path)), speaker, path)"
        for group in (speaker, "path"):
            count = journal.value(f"SELECT count(DISTINCT {group}) FROM kept WHERE part = 'train'")
            if count < 2:
                if group == "path" and not (split == "valid" and _hold_parts(journal, wanted)):
                    log.warning("there is no split %s: it takes two recordings, to hold one out", split)
                continue
            held = min(max(1, round(wanted / left * count)), count - 1)  # a share of all that there were
            journal.db.execute(
                f"""UPDATE rows SET part = ? WHERE part = 'train' AND {group} IN (
                SELECT {group} FROM kept WHERE part = 'train' GROUP BY 1
                ORDER BY max(before IS ?) DESC, share(? || {group}) LIMIT ?)""",
                (split, split, f"{seed}/{split}/" if seed else "", held),
            )
            left -= wanted
            break


def _hold_parts(journal: Journal, wanted: float) -> bool:
    """Hold out the last parts of the only recording there is, if it was cut; returns whether it was."""
    rows = journal.db.execute("SELECT id, max(json_array_length(cuts), 1) FROM kept WHERE part = 'train'").fetchall()
    if len(rows) != 1 or rows[0][1] < 2:
        return False  # rows of a table are held out with their recording, or not at all
    [(row, parts)] = rows
    held = min(max(1, round(wanted * parts)), parts - 1)
    journal.db.execute("UPDATE rows SET held = ? WHERE id = ?", (held, row))
    log.warning(
        "one recording only: the last %d of its %d parts are the split valid, of the same voice and room", held, parts
    )
    return True


def _group(journal: Journal) -> None:
    """One leader for all speakers that recordings tie together."""
    leaders: dict[str, str] = {}

    def leader(who: str) -> str:
        while leaders.get(who, who) != who:
            who = leaders[who]
        return who

    several = "SELECT path FROM rows GROUP BY path HAVING count(DISTINCT coalesce(speaker, path)) > 1"
    query = f"SELECT DISTINCT path, coalesce(speaker, path) FROM rows WHERE path IN ({several}) ORDER BY 1, 2"
    for _, together in itertools.groupby(journal.db.execute(query), key=lambda row: row[0]):
        first, *others = [leader(who) for _, who in together]
        leaders.update((other, min(first, *others)) for other in (first, *others))
    journal.db.execute("CREATE TEMP TABLE leaders (who TEXT PRIMARY KEY, leader TEXT)")
    journal.db.executemany("INSERT INTO leaders VALUES (?, ?)", [(who, leader(who)) for who in leaders])
