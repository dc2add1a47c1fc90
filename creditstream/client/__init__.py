"""The client for enrichment workers: may this run (`Gate`), and it ran (`CellRunProducer`).

Needs the base install only: no Faust, no ClickHouse, no event loop. `creditstream.client.testing` has doubles of both.
"""

from creditstream.client.decision import Because, Decision
from creditstream.client.gate import Gate
from creditstream.client.producer import CellRunProducer
from creditstream.client.recording import Counts, InvalidRun, RunRefused
from schemas.catalogue import Catalogue
from schemas.cell_run import CellRun, Outcome
from schemas.problem import Problem, Unreachable
from streams.settings import Settings, read_settings

__all__ = [
    "Because", "Catalogue", "CellRun", "CellRunProducer", "Counts", "Decision", "Gate", "InvalidRun", "Outcome",
    "Problem", "RunRefused", "Settings", "Unreachable", "read_settings",
]  # fmt: skip
