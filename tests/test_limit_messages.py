"""The reference for limit messages, where it has to judge by more than one order."""

from datetime import UTC, datetime
from typing import Any, Final

from schemas.cell_run import to_milliseconds
from tests.limit_messages import Reference, Told

NOW: Final = datetime.now(UTC)
NOW_MS: Final = to_milliseconds(NOW)


def row(
    topic: str, offset: int, kind: str, credits: str = "0", plan: str = "", allowance: str = "0"
) -> tuple[Any, ...]:
    """One of `ROWS`, of today."""
    day = NOW.date().isoformat()
    return (
        0, topic, offset, kind, "ws_1", "enrichment", credits, day, NOW_MS, NOW_MS, plan, allowance, (), "-1"
    )  # fmt: skip


def test_a_late_insert_hides_no_crossing_and_invents_none() -> None:
    """A plan's rows, inserted by a dead worker, stand before runs that its successor folded first: what was told under
    that order is told, and one alert less is a crossing that nobody heard of.
    """
    plan = row("account-events", 0, "plan", plan="p10", allowance="10")
    runs = [row("cell-runs", offset, "run", "1") for offset in range(9)]
    written, folded = Reference([plan, *runs]), Reference([*runs[:6], plan, *runs[6:]])
    told = folded.crossings()

    def places(alerts: set[Told]) -> list[str]:
        return sorted(alert.position for alert in alerts)

    assert places(told) == ["account-events[0]@0", "cell-runs[0]@7"]
    assert places(written.crossings()) == ["cell-runs[0]@4", "cell-runs[0]@7"]
    assert written.untold(told) == set()
    for alert in told:
        assert written.untold(told - {alert}) == written.crossings() - (told - {alert})
