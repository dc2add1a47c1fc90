"""The client for enrichment workers: may this run (`Gate`), and it ran (`CellRunProducer`).

Needs the base install only: no Faust, no ClickHouse, no event loop. `creditstream.client.testing` has doubles of both.
"""

from creditstream.client.decision import Because, Decision
from creditstream.client.gate import Gate

__all__ = ["Because", "Decision", "Gate"]
