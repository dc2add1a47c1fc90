"""Which catalogue versions the ledger's debits are priced by: pinned at their first use, and immutable from then on."""

from collections.abc import Sequence

from clickhouse_connect.driver.client import Client

from schemas.answers import PinnedVersion
from schemas.catalogue import Catalogue, Version
from schemas.cell_run import to_milliseconds
from schemas.problem import Problem


def pin_catalogue(client: Client, catalogue: Catalogue) -> None:
    """Record versions at their first use. Problem when one was changed, removed, or comes after its own time.

    A version is immutable and deployed before it takes effect, so that a run is priced the same whenever it is rated.
    Of workers that use a version first at the same time, the first one's content stands.
    """
    new = _unpinned(client, catalogue)
    for version in new:
        later = [one.number for one in catalogue.versions if one.effective_from > version.effective_from]
        _refuse_late(client, version, later)
    if new:
        client.insert(
            "catalogue_versions",
            [[version.number, version.content_hash, version.effective_from, version.file] for version in new],
            column_names=["number", "content_hash", "effective_from", "file"],
        )
        _unpinned(client, catalogue)


def _unpinned(client: Client, catalogue: Catalogue) -> list[Version]:
    """Versions that no worker has loaded yet. Problem when one that was is not as it was then."""
    pinned = {version.number: version.content_hash for version in catalogue_versions(client)}
    by_number = {version.number: version for version in catalogue.versions}
    for number, content in pinned.items():
        if number not in by_number:
            raise Problem("a catalogue version is gone", f"a worker has loaded version {number}", "Restore its file.")
        if by_number[number].content_hash != content:
            raise Problem(
                "a catalogue version was changed",
                f"{by_number[number].file}: a worker has loaded version {number} with other content",
                "Restore the file; put new prices into a new version.",
            )
    return [version for version in catalogue.versions if version.number not in pinned]


def _refuse_late(client: Client, version: Version, later: Sequence[int]) -> None:
    """``later``: numbers of the versions after it. One of them prices earlier runs of an action that was new in it: by
    a version in between that lists the action, such a run would cost something else. The actions are part of the
    statement: thousands of them in a parameter would be too many for a server.
    """
    ((late,),) = client.query(
        "SELECT count() FROM ledger WHERE kind = 'run' AND (ran_at >= fromUnixTimestamp64Milli(%(starts)s, 'UTC') "
        "OR has(%(later)s, catalogue) AND has(%(actions)s, toString(action)))",
        parameters={
            "starts": to_milliseconds(version.effective_from), "later": list(later), "actions": list(version.actions),
        },
    ).result_rows  # fmt: skip
    if late:
        raise Problem(
            "a catalogue version comes too late",
            f"{version.file}: runs that it would price and that are already priced: {late:,}",
            "Give it an effective_from in the future, after those of the versions that list the same actions.",
        )


def catalogue_versions(client: Client) -> list[PinnedVersion]:
    """The catalogue versions that workers have loaded, as the first one did."""
    found = client.query(
        "SELECT number, argMin(content_hash, (first_used_at, content_hash)) FROM catalogue_versions "
        "GROUP BY number ORDER BY number"
    )
    return [PinnedVersion(number=number, content_hash=content) for number, content in found.result_rows]
