"""The crash proof over a few faults, so that it holds on every commit; `python -m tests.proof` has hundreds."""

from pathlib import Path

from tests.proof import KINDS, dealt, prove, tables


def test_f9_whatever_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Worker, ClickHouse and Kafka are killed in turn, the server right before and after an insert, too."""
    kinds = [
        "worker: SIGKILL, its last insert lands after its successor has begun",
        "ClickHouse: SIGKILL after it has executed an insert",
        "Kafka: SIGKILL of the broker",
        "ClickHouse: SIGKILL before it executes an insert",
        "worker: SIGKILL while it works",
    ]
    proof = prove(tmp_path, kinds, seed=9, say=lambda line: None)
    assert proof.holds, (proof.books, proof.verdict)
    assert proof.books.events > 5_000
    assert proof.verdict.implied
    assert f"{len(kinds)} faults" in tables(proof)


def test_a_proof_has_a_fault_of_every_kind() -> None:
    """Each as often as it stands in the list, in an order of the seed's own."""
    thirty = dealt(30, seed=1)
    assert {kind: thirty.count(kind) for kind in KINDS} == {kind: often for kind, (often, _) in KINDS.items()}
    assert dealt(210, seed=1)[:30] == thirty != dealt(30, seed=2)
