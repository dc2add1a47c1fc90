"""`/metrics`: what `/v1/status` says, for Prometheus."""

from prometheus_client.parser import text_string_to_metric_families

from creditstream.metrics import exposition
from schemas.answers import Status, UnitStatus

STATUS = Status(
    version="0.1.0", ready=False, not_ready_because=["cell-runs[3]: a hole"], topic="cell-runs",
    kafka_bootstrap="127.0.0.1:9092",
    units=[
        UnitStatus(
            partition=0, mark=88_123, event_mark=-1, lag=40, event_lag=None, balances=12, rows_unwritten=250,
            incident="",
        ),
        UnitStatus(
            partition=3, mark=7, event_mark=2, lag=0, event_lag=1, balances=1, rows_unwritten=0, incident="a hole"
        ),
    ],
    written={"run/charged": 900, "run/no_data": 100, "dead_letter/malformed": 2},
    told={"crossed": 4, "exhausted": 1, "states": 77}, uptime_s=61, duplicate_filter_bytes=4_096,
)  # fmt: skip


def test_a_status_as_metrics() -> None:
    """Every figure of a status, under a name and labels that Prometheus' own parser reads; workspaces are no label."""
    found = {
        (sample.name.removeprefix("creditstream_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(exposition(STATUS).decode())
        for sample in family.samples
    }

    assert found == {
        ("ready",): 0,
        ("info", "0.1.0"): 1,
        ("uptime_seconds",): 61,
        ("duplicate_filter_bytes",): 4_096,
        ("incident", "0"): 0,
        ("incident", "3"): 1,
        ("unwritten_rows", "0"): 250,
        ("unwritten_rows", "3"): 0,
        ("accounts", "0"): 12,
        ("accounts", "3"): 1,
        ("mark_offset", "0", "cell-runs"): 88_123,
        ("mark_offset", "3", "cell-runs"): 7,
        ("mark_offset", "0", "account-events"): -1,
        ("mark_offset", "3", "account-events"): 2,
        ("lag_offsets", "0", "cell-runs"): 40,
        ("lag_offsets", "3", "cell-runs"): 0,
        ("lag_offsets", "3", "account-events"): 1,
        ("ledger_rows_total", "run", "charged"): 900,
        ("ledger_rows_total", "run", "no_data"): 100,
        ("ledger_rows_total", "dead_letter", "malformed"): 2,
        ("states_total",): 77,
        ("alerts_total", "crossed"): 4,
        ("alerts_total", "exhausted"): 1,
    }
