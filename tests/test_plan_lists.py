"""Plan lists: which plan a name means at an instant, and what is refused by file, plan and field."""

from pathlib import Path

import pytest

from schemas.cell_run import to_milliseconds
from schemas.plan import EXAMPLE_PLANS, PlanLists
from schemas.problem import Problem
from tests.account_records import at

PLAN = '[[plans]]\nid = "{id}"\nallowance = "{allowance}"\n'


def document(*plans: tuple[str, str], number: int = 1, since: str = "2026-01-01T00:00:00Z", more: str = "") -> str:
    """A list of (id, allowance)."""
    listed = "".join(PLAN.format(id=name, allowance=allowance) for name, allowance in plans)
    return f"version = {number}\neffective_from = {since}\n{listed}{more}"


REFUSED = {
    "bad_toml": ("version = \n", "line 1"),
    "too_deep": ("version = " + "[" * 100_000, "recursion"),
    "missing_version": (document().replace("version = 1\n", ""), "`version`"),
    "local_time": (document(since="2026-01-01T00:00:00"), "timezone"),
    "number": (document(("a", "1")).replace('"1"', "1"), "allowance"),
    "not_exact": (document(("a", "0.0005")), "plan `a`: '0.0005'"),
    "negative": (document(("a", "-1")), "plan `a`: credits must be between 0 and 10^12"),
    "too_many": (document(("a", "1000000000000")), "plan `a`: credits must be between 0 and 10^12"),
    "twice": (document(("a", "1"), ("a", "2")), "two plans have the same id"),
    "threshold_0": (document(("a", "1"), more="thresholds = [0]\n"), "thresholds"),
    "threshold_101": (document(("a", "1"), more="thresholds = [101]\n"), "thresholds"),
    "unknown_field": (document(("a", "1"), more="credits = 1\n"), "credits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_list_is_refused_by_file_and_field(case: str, tmp_path: Path) -> None:
    content, named = REFUSED[case]
    (tmp_path / "plans.toml").write_text(content)
    with pytest.raises(Problem) as refusal:
        PlanLists.load(tmp_path)
    assert "plans.toml" in refusal.value.why
    assert named in refusal.value.why


@pytest.mark.parametrize(
    ("number", "since"), [(2, "2026-01-01T00:00:00Z"), (1, "2026-02-01T00:00:00Z"), (2, "2025-12-01T00:00:00Z")]
)
def test_numbers_and_times_of_lists_agree(number: int, since: str, tmp_path: Path) -> None:
    """Of two lists the one that begins later has the higher version: else one was copied and half changed."""
    (tmp_path / "a.toml").write_text(document(("a", "1")))
    (tmp_path / "b.toml").write_text(document(("a", "2"), number=number, since=since))
    with pytest.raises(Problem, match="does not begin after version"):
        PlanLists.load(tmp_path)


def test_r01_the_example_plans_give_20_50_and_100_thousand() -> None:
    """Enrichment credits of a billing period; what else the list holds shows that others can be added."""
    allowances = {plan.id: plan.allowance for plan in PlanLists.load(EXAMPLE_PLANS).newest()}
    assert (allowances["20k"], allowances["50k"], allowances["100k"]) == (20_000_000, 50_000_000, 100_000_000)
    assert len(allowances) > 3


def test_no_list_is_a_sentence(tmp_path: Path) -> None:
    """The setting is named."""
    with pytest.raises(Problem, match=r"holds no \.toml file\. Set CREDITSTREAM_PLANS_DIR"):
        PlanLists.load(tmp_path)


def test_a_name_means_what_the_version_in_force_says(tmp_path: Path) -> None:
    """Where that does not list it, the newest earlier one that does; where there is none, the first later one."""
    (tmp_path / "b.toml").write_text(document(("old", "1"), ("kept", "1")))
    (tmp_path / "a.toml").write_text(document(("kept", "2"), number=2, since="2026-02-01T00:00:00Z"))
    (tmp_path / "c.toml").write_text(document(("kept", "3"), ("new", "3"), number=3, since="2026-03-01T00:00:00Z"))
    lists = PlanLists.load(tmp_path)

    def allowances(name: str) -> list[int | None]:
        days = ("Jan 1", "Jan 31 23:59:59.999", "Feb 1", "Mar 1")
        found = [lists.find(name, to_milliseconds(at(day))) for day in days]
        return [plan and plan.allowance // 1000 for plan in found]

    assert allowances("kept") == [1, 1, 2, 3]
    assert allowances("old") == [1, 1, 1, 1]
    assert allowances("new") == [3, 3, 3, 3]
    assert allowances("none") == [None] * 4
    assert [plan.id for plan in lists.newest()] == ["kept", "new"]
