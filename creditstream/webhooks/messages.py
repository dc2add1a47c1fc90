"""What an endpoint is sent: the alert as a Standard Webhook, or as a Slack message. Pure."""

from typing import Any, Final

import msgspec

from schemas.credits import group_credits, parse_credits
from schemas.ledger import Pool
from schemas.limits import AlertKind, LimitAlert
from schemas.webhook import BODY_BYTES_MAX, TYPE_PREFIX, Format, Webhook

_encode: Final = msgspec.json.Encoder().encode
_SLACK_ENTITIES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
TOP_COLUMNS_SHOWN: Final = 3


def body_of(alert: LimitAlert, form: Format) -> bytes:
    """The request's body; the same bytes for every attempt."""
    return _slack(alert) if form is Format.SLACK else _standard(alert)


def _standard(alert: LimitAlert) -> bytes:
    body = _webhook(alert)
    # Without this courtesy an alert of ours is short. One that is not goes as it is: the receiver may refuse it.
    return body if len(body) < BODY_BYTES_MAX else _webhook(msgspec.structs.replace(alert, top_columns=None))


def _webhook(alert: LimitAlert) -> bytes:
    return _encode(Webhook(type=f"{TYPE_PREFIX}{alert.kind}", timestamp=alert.at, data=alert))


def _slack(alert: LimitAlert) -> bytes:
    sentence = sentence_of(alert)
    details = ", ".join(_details_of(alert))
    blocks: list[dict[str, Any]] = [
        {"type": "section", "text": {"type": "mrkdwn", "text": escape(sentence)}},
        {"type": "context", "elements": [{"type": "mrkdwn", "text": escape(details)}]},
    ]
    # Slack shows `text` where it shows no blocks: in notifications.
    return _encode({"text": escape(sentence), "blocks": blocks})


def escape(text: str) -> str:
    """Slack's three control characters; a column named ``<!channel>`` must not call everyone."""
    return text.translate(_SLACK_ENTITIES)


def sentence_of(alert: LimitAlert) -> str:
    """The alert in one sentence, for people."""
    credits = f"{alert.pool} credits"
    used = f"{_amount(alert.used)} of {_amount(alert.allowance)} used"
    left = f"{used}, {_amount(alert.remaining)} left"
    passed = f"passed {_lines(alert)} of its {credits}" if _lines(alert) else f"has a new warning for its {credits}"
    again = " again" if alert.pool == Pool.ENRICHMENT else ""  # a first grant is told, too
    said = {
        AlertKind.EXHAUSTED: f"has no {credits} left: {used}",
        AlertKind.CROSSED: f"{passed}: {left}",
        AlertKind.RECOVERED: f"has {credits}{again}: {left}",
        AlertKind.PERIOD_STARTED: f"started a new period of {credits}: {left}",
    }[alert.kind]
    over = f", {_amount(alert.overage)} over" if alert.overage != "0" else ""
    return f"{'TEST: ' if alert.test else ''}{alert.workspace_id} {said}{over}."


def _details_of(alert: LimitAlert) -> list[str]:
    """What else people ask: the period, the cause, the columns that drew most."""
    details = [f"period {alert.period_start} to {alert.period_end}"] if alert.period_start else []
    if alert.plan:
        details.append(f"plan {alert.plan}")
    if alert.column_id:
        details.append(f"by {alert.action} in column {alert.column_id} of table {alert.table_id}")
    if alert.top_columns:
        top = "; ".join(
            f"{column.column_id} {_amount(column.credits)}" for column in alert.top_columns[:TOP_COLUMNS_SHOWN]
        )
        details.append(f"most drawn by: {top}")
    if alert.runs_out_on:
        details.append(f"runs out on {alert.runs_out_on}")
    return [*details, f"alert {alert.alert_id}"]


def _lines(alert: LimitAlert) -> str:
    return " and ".join(f"{percent} %" for percent in alert.thresholds)


def _amount(credits: str) -> str:
    """Credits for the eye; what is no number is shown as it is."""
    try:
        return group_credits(parse_credits(credits))
    except ValueError:
        return credits
