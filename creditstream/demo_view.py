"""What the demo shows while it runs: credits burning down, alerts as they come, and the worker at its gate."""

from collections.abc import Sequence
from typing import Final

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from creditstream.cli.tables import STATE_COLOURS
from creditstream.cli.terminal import printable
from creditstream.demo_scene import Listener, Told, TrialWorker
from schemas.answers import Status
from schemas.credits import group_credits, parse_credits
from schemas.ledger import Kind
from schemas.limits import LimitState

WORKSPACES_SHOWN: Final = 7


class Look:
    """What is known at one look."""

    def __init__(self, status: Status, before: int, produced: int, elapsed: float, seconds: int) -> None:
        self.written = sum(status.written.values()) - before
        self.rate = self.written / max(elapsed, 0.1)
        self.debits, self.duplicates, self.letters = (
            sum(number for name, number in status.written.items() if name.startswith(f"{kind}/"))
            for kind in (Kind.RUN, Kind.DUPLICATE, Kind.DEAD_LETTER)
        )
        self.waiting = max(0, produced - self.written)
        self.elapsed, self.seconds = min(elapsed, seconds), seconds


def live_view(look: Look, listener: Listener, worker: TrialWorker, trial: str) -> Group:
    """The whole picture."""
    numbers = (
        (f"{look.rate:,.0f}", "events/s"),
        (f"{look.debits:,}", "debits"),
        (f"{look.waiting:,}", "waiting"),
        (f"{look.duplicates:,}", "duplicates"),
        (f"{look.letters:,}", "dead letters"),
        (f"{listener.alerts:,}", "alerts"),
    )
    head = Text.assemble(*(part for number, name in numbers for part in ((number, "bold"), f" {name}  ")))
    bar = Table.grid()
    bar.add_row(ProgressBar(total=look.seconds, completed=look.elapsed, width=60))
    return Group(
        bar, head, Text(), _balances(listener.states, trial), Text(), _gate_line(worker, trial), Text(),
        *map(Text, [alert_line(told) for told in list(listener.told)] or ["no alert yet"]),
    )  # fmt: skip


def _balances(states: dict[str, LimitState], trial: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("workspace")
    table.add_column("plan")
    table.add_column("used", justify="right")
    table.add_column("of", justify="right")
    table.add_column("")
    table.add_column("state")
    for state in ranked(list(states.values()), trial)[:WORKSPACES_SHOWN]:
        used, allowance = parse_credits(state.used), parse_credits(state.allowance)
        style = STATE_COLOURS[state.state]
        bar = ProgressBar(total=max(1, allowance), completed=max(0, used), width=30, complete_style=style)
        table.add_row(
            Text(printable(state.workspace_id)), state.plan or "none", group_credits(used), group_credits(allowance),
            bar, Text(str(state.state), style),
        )  # fmt: skip
    return table


def ranked(states: Sequence[LimitState], trial: str) -> list[LimitState]:
    """The one that asks its gate first, then those who have drawn most."""
    return sorted(states, key=lambda state: (state.workspace_id != trial, -parse_credits(state.used)))


def _gate_line(worker: TrialWorker, trial: str) -> Text:
    if worker.freed_at:
        what = Text("upgraded: its gate says yes again", "green")
    elif worker.stopped_at:
        what = Text("stopped by its gate: out of credits", "red")
    else:
        what = Text("its gate says yes", "green")
    return Text.assemble((f"{trial}: ", "bold"), what, f"   {worker.allowed:,} allowed, {worker.refused:,} refused")


def alert_line(told: Told) -> str:
    """``23:16:03  exhausted  trial_2316  100 %  1,000 of 1,000 credits  (+38 ms)``: so long after its cause."""
    alert = told.alert
    lines = ", ".join(f"{percent} %" for percent in alert.thresholds)
    if alert.remaining_below:
        lines = ", ".join(filter(None, [lines, f"no more than {alert.remaining_below} left"]))
    used, allowance = group_credits(parse_credits(alert.used)), group_credits(parse_credits(alert.allowance))
    pool = "" if alert.pool == "enrichment" else f" {alert.pool}"
    return (
        f"{told.came_at:%H:%M:%S}  {alert.kind:<9}  {printable(alert.workspace_id):<12}  {lines or '-':<5}  "
        f"{used} of {allowance}{pool} credits  (+{told.after_ms:,} ms)"
    )
