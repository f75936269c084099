"""From a source to records on disk: what is excluded or known is dropped before it costs anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from specdec.drafters.training.exclusion import Exclusion, text_hash
from specdec.drafters.training.records import RecordWriter
from specdec.drafters.training.sources import Source


def collect(
    source: Source,
    writer: RecordWriter,
    exclusion: Exclusion,
    num_records: int | None,
    on_batch: Callable[[int], None] = lambda num_records: None,
    max_barren: int = 50,
) -> None:
    """Takes batch after batch until the folder holds `num_records` records (None: all that the source has).

    Whatever stops it, Ctrl-C included, leaves every finished batch on disk, and the next call goes on there: the records
    are those of a run that was never stopped. Raises ValueError after `max_barren` batches in a row without a new record.
    """
    barren = 0
    try:
        while num_records is None or writer.num_records < num_records:
            offered = source.texts(writer.cursor)
            if offered is None:
                break
            dropped: Counter[str] = Counter()
            fresh: dict[int, str] = {}
            for text in offered:
                key = text_hash(text)
                if not text:
                    dropped["empty"] += 1
                elif text in exclusion:
                    dropped["excluded"] += 1
                elif key in fresh or writer.has_source(key):
                    dropped["duplicate_sources"] += 1
                else:
                    fresh[key] = text
            records = source.records(list(fresh.values())) if fresh else []
            kept = writer.commit(records, {"offered": len(offered), **dropped})
            barren = 0 if kept else barren + 1
            if barren == max_barren:
                raise ValueError(f"{max_barren} batches in a row gave nothing new: {dict(writer.counts)}")
            on_batch(writer.num_records)
    finally:
        writer.flush()
