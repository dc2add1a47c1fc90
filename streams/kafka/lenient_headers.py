"""Record batches that aiokafka cannot read: header names that are not UTF-8.

Kafka takes any bytes as a header's name, librdkafka lets C, Go and Rust producers send them, and aiokafka's parser
raises on them inside the fetcher, for ever: one such record would stop a partition. Here the fetch is read again by
aiokafka's Python parser, which shows such bytes as escapes; everything else takes the fast road as before.
"""

from typing import Any, Final

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy


class _Bytes(bytearray):
    """A buffer whose parts decode whatever they hold."""

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        return _Bytes(part) if isinstance(place, slice) else part

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # aiokafka publishes no types
    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        if not isinstance(self._buffer, _Bytes):
            self._buffer = _Bytes(self._buffer)


class _LenientRecords(_MemoryRecordsPy):  # type: ignore[misc]
    def next_batch(self, *bounds: int) -> Any:
        part = self._next_slice
        batch = super().next_batch(*bounds)
        is_current_format = part is not None and part[self.MAGIC_OFFSET] >= 2
        return _LenientBatch(bytes(part)) if part is not None and is_current_format else batch


class Records:
    """aiokafka's records of one fetch, which can be read a second time."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._take(MemoryRecords(raw))

    def _take(self, records: Any) -> None:
        self.has_next, self.next_batch = records.has_next, records.next_batch
        self.size_in_bytes = records.size_in_bytes

    def read_leniently(self, offset: int) -> None:
        """Start again, leniently, with the batch that holds ``offset``: the ones before it have been delivered."""
        delivered, probe = 0, _LenientRecords(self._raw)
        while probe.has_next() and probe.next_batch().next_offset <= offset:
            delivered += 1
        records = _LenientRecords(self._raw)
        for _ in range(delivered):
            records.next_batch()
        self._take(records)


_next_record: Final = fetcher.PartitionRecords.__next__


def _next(self: Any) -> Any:
    try:
        return _next_record(self)
    except UnicodeDecodeError:
        self._records.read_leniently(self.next_fetch_offset)
        self._records_iterator = self._unpack_records()
        return _next_record(self)


def read_any_header() -> None:
    """From now on no header name stops a consumer of this process."""
    fetcher.MemoryRecords = Records
    fetcher.PartitionRecords.__next__ = _next
