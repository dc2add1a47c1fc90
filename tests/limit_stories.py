"""The published histories, and one story for each line of "Plans, grants and limits". Each says what must come of it.

``k x 1`` are k charged runs of `enrich_person`, e2 is one of `find_work_email`, p1 one of a premium action.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Final

from tests.account_records import SECOND, Story, at

E2: Final = "find_work_email"
P1: Final = "clearbit_enrich_company"
HISTORIES: Final[dict[str, Callable[[Story], None]]] = {}
RULES: Final[dict[str, Callable[[Story], None]]] = {}


def history(tell: Callable[[Story], None]) -> Callable[[Story], None]:
    """One line of the published histories."""
    HISTORIES[tell.__name__] = tell
    return tell


def rule(tell: Callable[[Story], None]) -> Callable[[Story], None]:
    """One rule, or one decided question."""
    RULES[tell.__name__] = tell
    return tell


# The published histories.


@history
def a_month_to_the_end_of_its_credits(story: Story) -> None:
    """On each line one alert; the run that did not fit is charged: overage 1."""
    story.plan("20k", at("Jan 15 14:00"))
    story.runs(9_999, at("Jan 15 15:00"), at("Jan 16"))
    story.check(9_999, 20_000, "ok", period=("Jan 15", "Feb 15"))
    story.run(at("Jan 16 01:00"))
    story.check(10_000, 20_000, "warning")
    story.tells("crossed", 50)
    story.runs(5_999, at("Jan 17"), at("Jan 18"))
    story.check(15_999, 20_000, "warning")
    story.run(at("Jan 18 01:00"), E2)
    story.check(16_001, 20_000, "warning")
    story.tells("crossed", 80)
    story.runs(3_998, at("Jan 19"), at("Jan 20"))
    story.check(19_999, 20_000, "warning")
    story.run(at("Jan 20 01:00"), E2)
    story.check(20_001, 20_000, "exhausted")
    story.tells("exhausted", 100)


@history
def one_record_that_crosses_two_lines(story: Story) -> None:
    """It sends one alert that lists them both."""
    story.plan("4", at("Jan 15"))
    story.run(at("Jan 15 01:00"))
    story.check(1, 4, "ok")
    story.run(at("Jan 15 02:00"), E2)
    story.check(3, 4, "warning")
    story.tells("crossed", 50)
    story.run(at("Jan 15 03:00"))
    story.check(4, 4, "exhausted")
    story.tells("exhausted", 80, 100)


@history
def an_anchor_on_the_31st(story: Story) -> None:
    """Clamped per month from the original day; a run belongs to the day that it ran on, to the millisecond."""
    story.plan("20k", at("Jan 31 14:00"))
    story.run(at("Feb 27 23:59:59.999"))
    story.check(0, 20_000, "ok", period=("Feb 28", "Mar 31"))
    story.run(at("Feb 28"))
    story.check(1, 20_000, "ok", period=("Feb 28", "Mar 31"))
    story.run(at("Mar 30 23:59:59"))
    story.run(at("Mar 31"))
    story.check(1, 20_000, "ok", period=("Mar 31", "Apr 30"))
    story.ends_with("Jan 31", "Feb 28", 1, 20_000)
    story.ends_with("Feb 28", "Mar 31", 2, 20_000)
    story.ends_with("Mar 31", "Apr 30", 1, 20_000)


@history
def r06_an_upgrade_at_any_time(story: Story) -> None:
    """With effect at once: recovered, and the lines of the larger allowance can be crossed."""
    story.plan("20k", at("Jan 15 14:00"))
    story.runs(20_000, at("Jan 15 15:00"), at("Jan 25"))
    story.check(20_000, 20_000, "exhausted")
    for kind, percent in (("crossed", 50), ("crossed", 80), ("exhausted", 100)):
        story.tells(kind, percent)
    story.plan("50k", at("Jan 26 10:00"))
    story.check(20_000, 50_000, "ok", period=("Jan 15", "Feb 15"))
    story.tells("recovered")
    story.runs(5_000, at("Jan 26 11:00"), at("Jan 27"))
    story.check(25_000, 50_000, "warning")
    story.tells("crossed", 50)


@history
def a_downgrade_waits_for_the_next_period(story: Story) -> None:
    """Which begins by time alone, without any record."""
    story.plan("50k", at("Jan 15 14:00"))
    story.plan("20k", at("Jan 20 12:00"))
    story.runs(30_000, at("Jan 20 13:00"), at("Jan 25"))
    story.check(30_000, 50_000, "warning", period=("Jan 15", "Feb 15"))
    story.tells("crossed", 50)
    story.check(0, 20_000, "ok", when=at("Feb 15"), period=("Feb 15", "Mar 15"))
    story.tells("period_started")


@history
def a_renewal_at_14_00_belongs_to_the_whole_day(story: Story) -> None:
    """The opening plan is the one in force at the end of the first day: now, while that day lasts."""
    story.plan("50k", at("Jan 15 14:00"))
    story.runs(12_000, at("Feb 15"), at("Feb 15 10:00"))
    story.check(12_000, 50_000, "ok", period=("Feb 15", "Mar 15"))
    story.plan("20k", at("Feb 15 14:00"))
    story.check(12_000, 20_000, "warning")
    story.tells("crossed", 50)


@history
def a_plan_that_arrives_late(story: Story) -> None:
    """The debits from the day of its effect on count against it; the days before lie in a cut calendar month."""
    story.runs(3_000, at("Jan 3"), at("Jan 9 23:59:59"))
    story.runs(12_000, at("Jan 10"), at("Jan 19 23:00"))
    story.check(15_000, 0, "unknown_plan", period=("Jan 1", "Feb 1"))
    story.plan("20k", at("Jan 10 15:00"), at("Jan 20"))
    story.check(12_000, 20_000, "warning", period=("Jan 10", "Feb 10"))
    story.tells("crossed", 50)
    story.ends_with("Jan 1", "Jan 10", 3_000, 0)


@history
def a_reversal_once_and_a_line_crossed_again(story: Story) -> None:
    """Sent again, and the run delivered again, it changes nothing; another record crosses 100 with another id."""
    story.plan("20k", at("Jan 15"))
    first = story.run(at("Jan 15 01:00"), E2)
    story.runs(19_998, at("Jan 15 02:00"), at("Jan 16"))
    story.check(20_000, 20_000, "exhausted")
    for kind, percent in (("crossed", 50), ("crossed", 80), ("exhausted", 100)):
        story.tells(kind, percent)
    story.reverse(first, at("Jan 17"))
    story.check(19_998, 20_000, "warning")
    story.tells("recovered", 50, 80)
    story.reverse(first, at("Jan 18"))
    story.check(19_998, 20_000, "warning")
    story.run(at("Jan 15 01:00"), E2, at("Jan 19"), run=first)
    story.check(19_998, 20_000, "warning")
    story.run(at("Jan 20"))
    story.check(19_999, 20_000, "warning")
    story.run(at("Jan 20 01:00"))
    story.check(20_000, 20_000, "exhausted")
    story.tells("exhausted", 100)


@history
def a_late_run_and_a_late_reversal(story: Story) -> None:
    """They change the closed period, and nobody is told."""
    story.plan("20k", at("Jan 15"))
    reversed_later = story.run(at("Feb 10"), E2)
    story.runs(9_997, at("Feb 11"), at("Feb 14 22:00"))
    story.check(9_999, 20_000, "ok", period=("Jan 15", "Feb 15"))
    story.run(at("Feb 14 23:00"), recorded=at("Feb 16"))
    story.check(0, 20_000, "ok", period=("Feb 15", "Mar 15"))
    story.reverse(reversed_later, at("Feb 16 01:00"))
    story.check(0, 20_000, "ok")
    story.ends_with("Jan 15", "Feb 15", 9_998, 20_000)


@history
def a_run_twice_and_a_run_that_says_something_else(story: Story) -> None:
    """Charged once, in the month that it ran in; of two events under one id the first stands."""
    story.plan("20k", at("Jan 15"))
    twice = story.run(at("Jan 16"))
    story.run(at("Jan 16"), recorded=at("Jan 16 00:01"), run=twice)
    failed = story.run(at("Jan 17"), outcome="error")
    story.run(at("Jan 17"), recorded=at("Jan 17 00:01"), run=failed)
    story.check(1, 20_000, "ok")
    story.run(at("Jan 16"), recorded=at("Feb 20"), run=twice)
    story.run(at("Feb 20"))
    story.check(1, 20_000, "ok", period=("Feb 15", "Mar 15"))
    story.ends_with("Jan 15", "Feb 15", 1, 20_000)


# Allowances, periods, plans.


@rule
def the_allowance_is_the_largest_that_was_in_force(story: Story) -> None:
    """An upgrade and a downgrade in one period: the upgrade's stays until the period ends."""
    story.plan("10", at("Jan 15"))
    story.plan("50", at("Jan 16 12:00"))
    story.plan("20", at("Jan 17 12:00"))
    story.runs(25, at("Jan 18"), at("Jan 19"))
    story.check(25, 50, "warning")
    story.tells("crossed", 50)
    story.run(at("Feb 15 01:00"))
    story.check(1, 20, "ok", period=("Feb 15", "Mar 15"))
    story.tells("period_started")


@rule
def a_wrong_plan_is_corrected_by_another_at_the_same_instant(story: Story) -> None:
    """Of two plans at one instant the later offset stands, so here the allowance falls within the period."""
    story.plan("50", at("Jan 15"))
    story.runs(12, at("Jan 16"), at("Jan 17"))
    story.check(12, 50, "ok")
    story.plan("20", at("Jan 15"), at("Jan 18"))
    story.check(12, 20, "warning")
    story.tells("crossed", 50)


@rule
def plans_are_ordered_by_their_effect(story: Story) -> None:
    """A plan from the past that arrives after a newer one fills the past, and may raise the period's allowance."""
    story.plan("10", at("Jan 15"))
    story.plan("20", at("Jan 20"))
    story.runs(16, at("Jan 21"), at("Jan 22"))
    story.check(16, 20, "warning")
    story.tells("crossed", 50)
    story.tells("crossed", 80)
    story.plan("50", at("Jan 18"), at("Jan 23"))
    story.check(16, 50, "ok")
    story.tells("recovered")


@rule
def restart_period_begins_a_period_on_that_day(story: Story) -> None:
    """The whole day belongs to it, what ran that morning too; two restarts on one day make one period."""
    story.plan("10", at("Jan 15"))
    story.runs(5, at("Jan 16"), at("Jan 17"))
    story.tells("crossed", 50)
    story.runs(2, at("Jan 20 08:00"), at("Jan 20 09:00"))
    story.check(7, 10, "warning")
    story.plan("20", at("Jan 20 12:00"), restart=True)
    story.check(2, 20, "ok", period=("Jan 20", "Feb 20"))
    story.tells("recovered")
    story.plan("4", at("Jan 20 15:00"), restart=True)
    story.check(2, 4, "warning", period=("Jan 20", "Feb 20"))
    story.tells("crossed", 50)
    story.ends_with("Jan 15", "Jan 20", 5, 10)


@rule
def a_restart_in_the_future_cuts_nothing_until_then(story: Story) -> None:
    """And then it does, by time alone: the severity falls."""
    story.plan("10", at("Jan 15"))
    story.plan("20", at("Jan 25 12:00"), at("Jan 16"), restart=True)
    story.runs(5, at("Jan 17"), at("Jan 18"))
    story.check(5, 10, "warning", period=("Jan 15", "Feb 15"))
    story.tells("crossed", 50)
    story.check(0, 20, "ok", when=at("Jan 25 12:00"), period=("Jan 25", "Feb 25"))
    story.tells("recovered")


@rule
def a_planned_upgrade_comes_by_time_alone(story: Story) -> None:
    """Its effect sends what its arrival would have sent."""
    story.plan("10", at("Jan 15"))
    story.plan("50", at("Jan 20 12:00"), at("Jan 16"))
    story.runs(10, at("Jan 17"), at("Jan 18"))
    story.check(10, 10, "exhausted")
    for kind, percent in (("crossed", 50), ("crossed", 80), ("exhausted", 100)):
        story.tells(kind, percent)
    story.check(10, 50, "ok", when=at("Jan 20 12:00"), period=("Jan 15", "Feb 15"))
    story.tells("recovered")


@rule
def a_planned_first_plan_comes_by_time_alone(story: Story) -> None:
    """Leaving unknown_plan for exhausted is told; before, nothing was."""
    story.runs(5, at("Jan 10"), at("Jan 11"))
    story.plan("4", at("Jan 11 12:00"), at("Jan 11 01:00"))
    story.run(at("Jan 11 02:00"))
    story.check(6, 0, "unknown_plan", period=("Jan 1", "Feb 1"))
    story.runs(3, at("Jan 11 03:00"), at("Jan 11 04:00"))
    story.check(5, 4, "exhausted", when=at("Jan 11 12:00"), period=("Jan 11", "Feb 11"))
    story.tells("exhausted", 50, 80, 100)


@rule
def cancelling_is_a_plan_with_allowance_0(story: Story) -> None:
    """From the next period on nothing remains; an ok pool is not told of it, since time alone did it."""
    story.plan("10", at("Jan 15"))
    story.run(at("Jan 16"))
    story.plan("cancelled", at("Jan 20"))
    story.check(1, 10, "ok")
    story.run(at("Feb 15 01:00"))
    story.check(1, 0, "exhausted", period=("Feb 15", "Mar 15"))
    story.plan("10", at("Feb 16"))
    story.check(1, 10, "ok")
    story.tells("recovered")


@rule
def a_first_plan_of_nothing_is_exhausted(story: Story) -> None:
    """It leaves unknown_plan for exhausted: one alert that lists no line, since percents of 0 are void."""
    story.run(at("Jan 15"))
    story.plan("cancelled", at("Jan 15 12:00"))
    story.check(1, 0, "exhausted")
    story.tells("exhausted")


@rule
def a_renewal_that_changes_nothing_is_not_told(story: Story) -> None:
    """The same plan again: no alert, and lines that were passed do not fire again."""
    story.plan("10", at("Jan 15"))
    story.runs(6, at("Jan 16"), at("Jan 17"))
    story.tells("crossed", 50)
    story.plan("10", at("Jan 18"))
    story.check(6, 10, "warning")
    story.run(at("Jan 19"))
    story.check(7, 10, "warning")


@rule
def a_run_ahead_of_a_periods_edge_counts_in_its_own_period(story: Story) -> None:
    """Up to 5 minutes are forgiven."""
    story.plan("10", at("Jan 15"))
    story.run(at("Feb 15 00:01"), recorded=at("Feb 14 23:58"))
    story.check(0, 10, "ok", period=("Jan 15", "Feb 15"))
    story.run(at("Feb 15 00:02"))
    story.check(2, 10, "ok", period=("Feb 15", "Mar 15"))


@rule
def a_late_run_among_others_counts_in_its_own_period(story: Story) -> None:
    """It neither crosses a line of the running period nor helps another run to."""
    story.plan("4", at("Jan 15"))
    story.run(at("Feb 16"))
    story.run(at("Feb 14 23:00"), recorded=at("Feb 16 00:01"))
    story.run(at("Feb 16 00:02"))
    story.tells("crossed", 50)
    story.check(2, 4, "warning", period=("Feb 15", "Mar 15"))
    story.ends_with("Jan 15", "Feb 15", 1, 4)


@rule
def r10_enrichment_credits_do_not_roll_over(story: Story) -> None:
    """A period begins with its allowance, whatever was left; an ok pool is told nothing."""
    story.plan("10", at("Jan 15"))
    story.run(at("Jan 16"))
    story.run(at("Mar 20"))
    story.check(1, 10, "ok", period=("Mar 15", "Apr 15"))
    story.ends_with("Feb 15", "Mar 15", 0, 10)


@rule
def each_period_begins_once(story: Story) -> None:
    """A pool that was exhausted hears of the first period that begins, and of no later one."""
    story.plan("4", at("Jan 15"))
    story.runs(4, at("Jan 16"), at("Jan 17"))
    for kind, percent in (("crossed", 50), ("exhausted", 80)):
        story.tells(kind, percent)
    story.alerts[-1] = ("exhausted", (80, 100))
    story.check(0, 4, "ok", when=at("Feb 15"))
    story.tells("period_started")
    story.run(at("Apr 20"))
    story.check(1, 4, "ok", period=("Apr 15", "May 15"))


@rule
def an_exhausted_pool_without_allowance_begins_each_period(story: Story) -> None:
    """A cancelled workspace is exhausted in every period, and each that begins says so."""
    story.plan("cancelled", at("Jan 15"))
    story.tells("exhausted")
    story.check(0, 0, "exhausted", when=at("Mar 15"), period=("Mar 15", "Apr 15"))
    story.tells("period_started")
    story.tells("period_started")


# Thresholds.


@rule
def a_plans_thresholds_replace_the_default_ones(story: Story) -> None:
    """100 is always there, and an absolute line; on the line counts."""
    story.plan("own_lines", at("Jan 15"))
    story.runs(3, at("Jan 16"), at("Jan 16 02:00"))
    story.tells("crossed", 30)
    story.runs(3, at("Jan 17"), at("Jan 17 02:00"))
    story.tells("crossed", 60)
    story.check(6, 10, "warning")
    story.runs(2, at("Jan 18"), at("Jan 18 02:00"))
    story.tells("crossed")
    story.runs(2, at("Jan 19"), at("Jan 19 02:00"))
    story.tells("exhausted", 100)


@rule
def a_workspaces_thresholds_replace_its_plans(story: Story) -> None:
    """What is left out falls back to the plan's; they never alert by themselves."""
    story.plan("own_lines", at("Jan 15"))
    story.runs(5, at("Jan 16"), at("Jan 16 02:00"))
    story.tells("crossed", 30)
    story.limits(at("Jan 17"), thresholds=[90])
    story.check(5, 10, "ok")
    story.limits(at("Jan 18"), thresholds=[20, 70])
    story.check(5, 10, "warning")
    story.runs(2, at("Jan 19"), at("Jan 19 02:00"))
    story.tells("crossed", 70)
    story.run(at("Jan 20"))
    story.tells("crossed")
    story.limits(at("Jan 21"))
    story.run(at("Jan 22"))
    story.check(9, 10, "warning")


@rule
def an_absolute_line_of_the_workspace(story: Story) -> None:
    """Void where nothing had to be used for it."""
    story.plan("10", at("Jan 15"))
    story.limits(at("Jan 16"), thresholds=[], below="9.5")
    story.run(at("Jan 17"))
    story.tells("crossed")
    story.check(1, 10, "warning")
    story.limits(at("Jan 18"), thresholds=[], below="10")
    story.check(1, 10, "ok")
    story.runs(9, at("Jan 19"), at("Jan 20"))
    story.tells("exhausted", 100)


@rule
def two_records_that_cross_one_line_each(story: Story) -> None:
    """They send two alerts, even in one take."""
    story.plan("10", at("Jan 15"))
    story.runs(8, at("Jan 16"), at("Jan 16"))
    story.tells("crossed", 50)
    story.tells("crossed", 80)
    story.check(8, 10, "warning")


@rule
def a_reversal_that_leaves_the_severity_tells_nothing(story: Story) -> None:
    """Below 80 it is still a warning; crossed again, 80 is told again."""
    story.plan("10", at("Jan 15"))
    story.runs(7, at("Jan 16"), at("Jan 17"))
    story.tells("crossed", 50)
    last = story.run(at("Jan 18"))
    story.tells("crossed", 80)
    story.reverse(last, at("Jan 19"))
    story.check(7, 10, "warning")
    story.run(at("Jan 20"))
    story.tells("crossed", 80)
    story.check(8, 10, "warning")


@rule
def a_reversal_of_a_free_run_is_nothing(story: Story) -> None:
    """A row of 0."""
    story.plan("4", at("Jan 15"))
    free = story.run(at("Jan 16"), "format_date")
    failed = story.run(at("Jan 16"), outcome="error")
    story.reverse(free, at("Jan 17"))
    story.reverse(failed, at("Jan 18"))
    story.check(0, 4, "ok")


@rule
def a_reversal_of_a_run_that_is_not_there_waits(story: Story) -> None:
    """It is set aside; sent again once the run is there, it is taken."""
    story.plan("4", at("Jan 15"))
    run = 77_000_001
    story.reverse(run, at("Jan 16"))
    story.run(at("Jan 16 12:00"), E2, run=run)
    story.tells("crossed", 50)
    story.check(2, 4, "warning")
    story.reverse(run, at("Jan 17"))
    story.tells("recovered")
    story.check(0, 4, "ok")


# Premium.


@rule
def r07_premium_draws_from_grants(story: Story) -> None:
    """Without any grant nothing remains, and nobody is told; a grant fills the pool."""
    story.plan("10", at("Jan 15"))
    story.check(0, 0, "exhausted", pool="premium")
    story.run(at("Jan 16"), P1)
    story.check(1, 0, "exhausted", pool="premium")
    story.grant("4", at("Jan 17"))
    story.tells("recovered")
    story.check(1, 4, "ok", pool="premium")
    story.check(0, 10, "ok")
    story.run(at("Jan 18"), P1)
    story.tells("crossed", 50)
    story.runs(2, at("Jan 19"), at("Jan 20"), P1)
    story.tells("exhausted", 80, 100)
    story.check(4, 4, "exhausted", pool="premium")


@rule
def r10_premium_credits_roll_over(story: Story) -> None:
    """No period, no lateness: a run of a closed month draws, and alerts."""
    story.plan("10", at("Jan 15"))
    story.grant("2", at("Jan 16"))
    story.tells("recovered")
    story.run(at("Jan 20"), P1, at("Apr 20"))
    story.tells("crossed", 50)
    story.check(1, 2, "warning", pool="premium")


@rule
def premium_percents_are_of_the_newest_grant(story: Story) -> None:
    """p % is crossed when at most (100 - p) % of it remain."""
    story.plan("10", at("Jan 15"))
    story.grant("100", at("Jan 16"))
    story.tells("recovered")
    story.grant("10", at("Jan 17"))
    story.runs(104, at("Jan 18"), at("Jan 19"), P1)
    story.check(104, 110, "ok", pool="premium")
    story.run(at("Jan 20"), P1)
    story.tells("crossed", 50)
    story.check(105, 110, "warning", pool="premium")


@rule
def a_grant_that_comes_by_time_alone(story: Story) -> None:
    """It lifts the pool when its instant comes, and says nothing of the other pool."""
    story.plan("4", at("Jan 15"))
    story.runs(2, at("Jan 16"), at("Jan 17"))
    story.tells("crossed", 50)
    story.grant("5", at("Jan 20 12:00"), at("Jan 18"))
    story.check(0, 0, "exhausted", pool="premium")
    story.check(0, 5, "ok", pool="premium", when=at("Jan 20 12:00"))
    story.tells("recovered")
    story.check(2, 4, "warning", when=at("Jan 20 13:00"), period=("Jan 15", "Feb 15"))


@rule
def a_premium_reversal_is_never_late(story: Story) -> None:
    """It gives back whenever it comes."""
    story.plan("10", at("Jan 15"))
    story.grant("2", at("Jan 16"))
    story.tells("recovered")
    run = story.run(at("Jan 17"), P1)
    story.tells("crossed", 50)
    story.reverse(run, at("Mar 20"))
    story.tells("recovered")
    story.check(0, 2, "ok", pool="premium")


@rule
def a_plans_thresholds_hold_for_premium_too(story: Story) -> None:
    """Also when the plan takes effect by time alone."""
    story.plan("10", at("Jan 15"))
    story.grant("10", at("Jan 16"))
    story.tells("recovered")
    story.runs(4, at("Jan 17"), at("Jan 18"), P1)
    story.check(4, 10, "ok", pool="premium")
    story.plan("own_lines", at("Jan 25"), at("Jan 19"))
    story.check(4, 10, "warning", pool="premium", when=at("Jan 25") + SECOND)
    story.tells("crossed", 30)


@rule
def the_millisecond_decides(story: Story) -> None:
    """An instant belongs to the period that begins with it."""
    story.plan("4", at("Jan 15"))
    story.runs(2, at("Feb 14 23:59:59"), at("Feb 14 23:59:59"))
    story.steps[-2:] = [step._replace(recorded=at("Feb 14 23:59:59.999")) for step in story.steps[-2:]]
    story.tells("crossed", 50)
    story.check(2, 4, "warning", period=("Jan 15", "Feb 15"))
    story.check(0, 4, "ok", when=at("Feb 14 23:59:59.999") + timedelta(milliseconds=1), period=("Feb 15", "Mar 15"))
    story.tells("period_started")
