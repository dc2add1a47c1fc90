"""Kafka's jars, as `kafka_jars.txt` lists them: from Maven Central into the user's cache, each checked by its sum."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final, NamedTuple

from creditstream.home import take_lock
from schemas.problem import Unreachable

Say = Callable[[str], object]

KAFKA: Final = "4.4.0"
JARS_LIST: Final = Path(__file__).with_name("kafka_jars.txt")
JARS_AT_ONCE: Final = 4
JARS_TIMEOUT_S: Final = 20
JARS_WAIT_S_MAX: Final = 600.0
"""How long one process waits while another loads the jars."""
PROGRESS_EVERY_S: Final = 1.0


class Jar(NamedTuple):
    """One line of `kafka_jars.txt`."""

    group: str
    artifact: str
    version: str
    sha256: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        """Its name in the cache."""
        return f"{self.artifact}-{self.version}.jar"


def load_jars(say: Say, cache: Path | None = None, repository: str | None = None) -> list[Path]:
    """Kafka's jars in `cache` (the user's cache), missing ones from `repository` (Maven Central).

    A jar gets its name only after its sum was checked, so one that is there is whole; processes that load at
    once take turns. Raises `Unreachable` when one cannot be had.
    """
    cache = cache or _user_cache() / f"kafka-{KAFKA}"
    jars = list(_listed_jars())
    if _missing(jars, cache):
        lock = take_lock(cache / "load.lock", JARS_WAIT_S_MAX)
        if lock is None:
            raise Unreachable(
                "Kafka's jars cannot be downloaded", "another process has been downloading them for too long"
            )
        try:
            _load(_missing(jars, cache), cache, repository, say)
        finally:
            os.close(lock)
    return [cache / jar.file_name for jar in jars]


def _load(jars: list[Jar], cache: Path, repository: str | None, say: Say) -> None:
    if not jars:
        return
    megabytes = sum(jar.size_bytes for jar in jars) / 1e6
    said_at = 0.0
    with (
        tempfile.TemporaryDirectory(dir=cache, prefix="loading-") as staging,
        ThreadPoolExecutor(JARS_AT_ONCE) as pool,
    ):
        loads = [pool.submit(_load_one, jar, cache, Path(staging), repository) for jar in jars]
        try:
            for done, load in enumerate(as_completed(loads), start=1):
                load.result()
                if done == len(jars) or time.monotonic() - said_at >= PROGRESS_EVERY_S:
                    said_at = time.monotonic()
                    say(f"downloading Kafka's {len(jars)} jars, {megabytes:.0f} MB, once: {done}/{len(jars)}")
        except (OSError, RuntimeError) as error:
            pool.shutdown(cancel_futures=True)
            raise Unreachable(
                "Kafka's jars cannot be downloaded",
                str(error),
                f"Check the network (HTTPS_PROXY is used), or copy the jars that {JARS_LIST.name} lists into {cache}.",
            ) from error


def _load_one(jar: Jar, cache: Path, staging: Path, repository: str | None) -> None:
    """Load one file, not what its POM asks for: the list is complete, jgo's own mediation goes wrong."""
    from jgo.maven import MavenContext

    remote = {"central": repository} if repository else None
    context = MavenContext(repo_cache=staging, local_repos=[], remote_repos=remote, timeout=JARS_TIMEOUT_S)
    loaded = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
    if hashlib.sha256(loaded.read_bytes()).hexdigest() != jar.sha256:
        raise RuntimeError(f"{jar.file_name} is not the file that {JARS_LIST.name} lists")
    loaded.replace(cache / jar.file_name)


def _listed_jars() -> Iterator[Jar]:
    for line in JARS_LIST.read_text().splitlines():
        if not line.startswith("#"):
            coordinates, sha256, size = line.split()
            group, artifact, version = coordinates.split(":")
            yield Jar(group, artifact, version, sha256, int(size))


def _missing(jars: list[Jar], cache: Path) -> list[Jar]:
    def is_whole(path: Path, size_bytes: int) -> bool:
        return path.exists() and path.stat().st_size == size_bytes

    return [jar for jar in jars if not is_whole(cache / jar.file_name, jar.size_bytes)]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "creditstream"
