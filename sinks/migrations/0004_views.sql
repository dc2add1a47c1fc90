-- What analysts read: views with a comment on every column, never the table behind them. Reversals count, so that usage
-- adds up to the balance.
--
-- Plans, periods, balances and alerts are as streams/periods.py and streams/limits.py say them in Python: tests hold
-- both equal. What takes `as_of` goes by what the ledger knows now and has taken effect by then; debits count by their
-- whole day. A run may lie 5 minutes ahead, and with it the last day. A parameter's text bears no time zone: now is
-- given in that of the parameter, whatever the server's is.

CREATE OR REPLACE VIEW debits
(
    kind String COMMENT 'run, or reversal: what a run drew, taken back on its day',
    run_id UUID COMMENT 'names the run: the same on redelivery, new on every re-run; of a reversal, the run reversed',
    workspace_id String COMMENT 'who pays',
    table_id String COMMENT 'table of the cell',
    column_id String COMMENT 'column of the cell',
    row_id String COMMENT 'row of the cell',
    action String COMMENT 'what ran; an id of the catalogue',
    outcome String COMMENT 'data, no_data or error; empty for a reversal',
    own_api_key Bool COMMENT 'ran with the own API key of the workspace',
    ran_at DateTime64(3, 'UTC') COMMENT 'when it ran; decides price and billing period',
    recorded_at DateTime64(3, 'UTC') COMMENT 'when Kafka received it',
    day Date COMMENT 'UTC day of ran_at',
    triggered_by String COMMENT 'manual, auto_update, schedule, api, waterfall, ...; empty when not said',
    actor String COMMENT 'who started it; empty when not said',
    pool String COMMENT 'balance that it draws: enrichment or premium; none for actions without a price',
    credits Decimal(18, 3) COMMENT 'what it drew; 0 for a free run, negative for a reversal',
    reason String COMMENT 'why: charged, charged_no_data, own_api_key, free_action, error, no_data; reversed',
    catalogue UInt16 COMMENT 'version of the catalogue that priced it',
    position String COMMENT 'where the event lies in Kafka: topic[partition]@offset'
) AS
SELECT toString(kind) AS kind, run_id, toString(workspace_id) AS workspace_id, toString(table_id) AS table_id,
       toString(column_id) AS column_id, row_id, toString(action) AS action, toString(outcome) AS outcome, own_api_key,
       ran_at, recorded_at, day, toString(triggered_by) AS triggered_by, toString(actor) AS actor,
       toString(pool) AS pool, credits, toString(reason) AS reason, catalogue,
       concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset)) AS position
FROM ledger
WHERE ledger.kind IN ('run', 'reversal')
COMMENT 'one row for every cell run, free runs included, and one for every reversal';

CREATE OR REPLACE VIEW usage_by_column
(
    workspace_id LowCardinality(String) COMMENT 'who pays',
    day Date COMMENT 'UTC day of ran_at',
    table_id LowCardinality(String) COMMENT 'table of the cells',
    column_id LowCardinality(String) COMMENT 'column of the cells',
    action LowCardinality(String) COMMENT 'what ran',
    pool Enum8('none' = 1, 'enrichment' = 2, 'premium' = 3) COMMENT 'balance that was drawn',
    reason String COMMENT 'why the runs cost what they cost; reversed: what was taken back',
    credits Decimal(38, 3) COMMENT 'credits drawn; negative where reversed',
    runs UInt64 COMMENT 'cell runs, free ones included; a reversal is none'
) AS
SELECT workspace_id, day, table_id, column_id, action, pool, toString(reason) AS reason, sum(credits) AS credits,
       if(kind = 'run', count(), 0) AS runs
FROM ledger
WHERE kind IN ('run', 'reversal')
GROUP BY workspace_id, day, table_id, column_id, action, pool, kind, reason
COMMENT 'credits and runs by workspace, day, table, column, action, pool and reason; served by a projection';

CREATE OR REPLACE VIEW usage_by_day
(
    workspace_id LowCardinality(String) COMMENT 'who pays',
    day Date COMMENT 'UTC day of ran_at',
    pool Enum8('none' = 1, 'enrichment' = 2, 'premium' = 3) COMMENT 'balance that was drawn',
    credits Decimal(38, 3) COMMENT 'credits drawn, less what was reversed',
    runs UInt64 COMMENT 'cell runs, free ones included'
) AS
SELECT workspace_id, day, pool, sum(drawn) AS credits, sum(if(kind = 'run', counted, 0)) AS runs
FROM
(
    SELECT workspace_id, day, pool, kind, sum(credits) AS drawn, count() AS counted
    FROM ledger
    WHERE kind IN ('run', 'reversal')
    GROUP BY workspace_id, day, pool, kind
)
GROUP BY workspace_id, day, pool
COMMENT 'credits and runs by workspace, day and pool; served by a projection';

CREATE OR REPLACE VIEW free_runs
(
    workspace_id LowCardinality(String) COMMENT 'who did not pay',
    day Date COMMENT 'UTC day of ran_at',
    action LowCardinality(String) COMMENT 'what ran',
    reason String COMMENT 'own_api_key, free_action, error or no_data',
    runs UInt64 COMMENT 'runs that drew nothing'
) AS
SELECT workspace_id, day, action, toString(reason) AS reason, count() AS runs
FROM ledger
WHERE kind = 'run' AND reason IN ('own_api_key', 'free_action', 'error', 'no_data')
GROUP BY workspace_id, day, action, reason
COMMENT 'free runs and the rule that made them free; served by a projection';

CREATE OR REPLACE VIEW dead_letters
(
    position String COMMENT 'where the event lies in Kafka: topic[partition]@offset',
    recorded_at DateTime64(3, 'UTC') COMMENT 'when Kafka received it',
    reason String COMMENT 'too_large, malformed, misrouted, future_run, stale_run, conflicting_duplicate, unknown_...',
    detail String COMMENT 'the field or the fact that was wrong',
    workspace_id String COMMENT 'who would pay; empty when it could not be decoded',
    run_id UUID COMMENT 'the run; zeros when it could not be decoded',
    raw_key String COMMENT 'Kafka key, as it came',
    raw_headers String COMMENT 'Kafka headers as JSON',
    raw String COMMENT 'the value, byte for byte as it came'
) AS
SELECT concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset)) AS position, recorded_at,
       toString(reason) AS reason, detail, toString(workspace_id) AS workspace_id, run_id, raw_key, raw_headers, raw
FROM ledger
WHERE kind = 'dead_letter'
COMMENT 'events that could not be metered, with their bytes';

CREATE OR REPLACE VIEW duplicates
(
    run_id UUID COMMENT 'the run that was delivered again',
    workspace_id String COMMENT 'who paid once',
    position String COMMENT 'where the copy lies in Kafka: topic[partition]@offset',
    recorded_at DateTime64(3, 'UTC') COMMENT 'when Kafka received the copy',
    detail String COMMENT 'where the run itself lies'
) AS
SELECT run_id, toString(workspace_id) AS workspace_id,
       concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset)) AS position, recorded_at, detail
FROM ledger
WHERE kind = 'duplicate' AND event_id = toUUID('00000000-0000-0000-0000-000000000000')
COMMENT 'copies of runs that are in the ledger already; each drew nothing';

-- A plan: 1 effective_at, 2 recorded_at, 3 offset, 4 name, 5 allowance, 6 restart_period, 7 thresholds, 8 the absolute
-- line. One aggregation: a first one by effective_at costs four times as much.
CREATE OR REPLACE VIEW accounts_as_of AS
SELECT workspace_id,
       arraySort(groupArrayIf((ran_at, recorded_at, kafka_offset, toString(plan), allowance, restart_period, thresholds,
                               remaining_below), kind = 'plan')) AS said,
       arrayFilter((plan, next) -> plan.1 != next, said, arrayShiftLeft(said.1, 1)) AS plans,
       if(empty(plans), [], arraySort(arrayDistinct(arrayPushFront(
           arrayMap(plan -> toDate(plan.1), arrayFilter(plan -> plan.6, plans)), toDate(plans[1].1))))) AS anchors,
       sumIf(allowance, kind = 'grant') AS granted,
       argMaxIf(allowance, (ran_at, recorded_at, kafka_offset), kind = 'grant') AS newest_grant,
       argMaxIf(thresholds, (recorded_at, kafka_offset), kind = 'limits') AS own_thresholds,
       if(countIf(kind = 'limits') = 0, -1, argMaxIf(remaining_below, (recorded_at, kafka_offset), kind = 'limits'))
           AS own_remaining_below
FROM ledger
WHERE kind IN ('plan', 'grant', 'limits') AND ran_at <= {as_of:DateTime64(3, 'UTC')}
GROUP BY workspace_id
COMMENT 'for other views: what account events said; of two plans at one instant the one that arrived last';

CREATE OR REPLACE VIEW billing_periods_as_of AS
SELECT workspace_id, period_start, period_end,
       arrayLast(plan -> toDate(plan.1) <= period_start, plans) AS opening,
       arrayMax(plan -> plan.5, arrayPushFront(
           arrayFilter(plan -> toDate(plan.1) > period_start AND toDate(plan.1) < period_end, plans),
           opening)) AS allowance,
       opening.4 AS plan
FROM
(
    SELECT workspace_id, plans, last_day, cut, addMonths(anchor, months) AS period_start,
           least(addMonths(anchor, months + 1), cut) AS period_end
    FROM
    (
        SELECT workspace_id, plans, last_day, span.1 AS anchor, span.2 AS cut
        FROM
        (
            SELECT workspace_id, groupArrayArray(plans) AS plans, min(first_day) AS since,
                   greatest(max(last_day), toDate({as_of:DateTime64(3, 'UTC')})) AS last_day,
                   groupArrayArray(anchors) AS from_plans,
                   if(empty(from_plans) OR since < from_plans[1],
                      arrayPushFront(from_plans, toStartOfMonth(since)), from_plans) AS starts
            FROM
            (
                SELECT workspace_id, plans, anchors, anchors[1] AS first_day, first_day AS last_day
                FROM accounts_as_of(as_of = {as_of:DateTime64(3, 'UTC')})
                WHERE notEmpty(anchors)
                UNION ALL
                SELECT workspace_id, [] AS plans, [] AS anchors, min(day) AS first_day, max(day) AS last_day
                FROM
                (
                    SELECT workspace_id, day FROM ledger
                    WHERE kind IN ('run', 'reversal')
                      AND day <= toDate({as_of:DateTime64(3, 'UTC')} + INTERVAL 5 MINUTE)
                    GROUP BY workspace_id, day
                )
                GROUP BY workspace_id
            )
            GROUP BY workspace_id
        )
        ARRAY JOIN arrayZip(starts, arrayPushBack(arrayPopFront(starts), toDate('2149-01-01'))) AS span
    )
    ARRAY JOIN range(toUInt32(greatest(dateDiff('month', anchor, least(cut - 1, last_day)) + 1, 0))) AS months
)
WHERE period_start < cut AND period_start <= last_day
COMMENT 'billing_periods as of an instant';

CREATE OR REPLACE VIEW billing_periods
(
    workspace_id LowCardinality(String) COMMENT 'whose period',
    period_start Date COMMENT 'first UTC day',
    period_end Date COMMENT 'first UTC day that is no longer in it',
    allowance Decimal(18, 3) COMMENT 'enrichment credits it offers; 0 before the first plan',
    plan String COMMENT 'plan in force at the end of its first day; empty before the first plan'
) AS
SELECT workspace_id, period_start, period_end, allowance, toString(plan) AS plan
FROM billing_periods_as_of(as_of = now64(3, 'UTC'))
COMMENT 'every billing period of every workspace from its first day up to now; calendar months before the first plan';

-- The days from which periods count are computed in place: nothing else of the accounts is, and no view is planned.
-- Two conditions would cost a millisecond each to plan: one on the sorting key's `ran_at`, so plans are asked for by
-- `effective_at`, which is the same; and one on `kind` before the sums, so it stands behind them: what is neither a run
-- nor a reversal draws nothing and counts as none.
CREATE OR REPLACE VIEW usage_by_period
(
    workspace_id LowCardinality(String) COMMENT 'who pays',
    period_start Date COMMENT 'first UTC day of the billing period',
    period_end Date COMMENT 'first UTC day that is no longer in it',
    table_id LowCardinality(String) COMMENT 'table of the cells',
    column_id LowCardinality(String) COMMENT 'column of the cells',
    pool Enum8('none' = 1, 'enrichment' = 2, 'premium' = 3) COMMENT 'balance that was drawn',
    credits Decimal(38, 3) COMMENT 'credits drawn, less what was reversed',
    runs UInt64 COMMENT 'cell runs, free ones included'
) AS
SELECT workspace_id, period_start, period_end, table_id, column_id, pool, sum(drawn) AS credits,
       sum(if(kind = 'run', counted, 0)) AS runs
FROM
(
    SELECT used.workspace_id AS workspace_id, table_id, column_id, pool, kind, drawn, counted,
           arrayLast(start -> start <= day, arrayPushFront(anchors, toStartOfMonth(day))) AS anchor,
           arrayFirst(start -> start > day, arrayPushBack(anchors, toDate(65535))) AS cut,
           dateDiff('month', anchor, day) - (addMonths(anchor, dateDiff('month', anchor, day)) > day) AS months,
           addMonths(anchor, months) AS period_start, least(addMonths(anchor, months + 1), cut) AS period_end
    FROM
    (
        SELECT workspace_id, day, table_id, column_id, pool, kind, sum(credits) AS drawn, count() AS counted
        FROM ledger
        GROUP BY workspace_id, day, table_id, column_id, pool, kind
    ) AS used
    LEFT JOIN
    (
        SELECT workspace_id, arraySort(arrayDistinct(arrayPushFront(groupArrayIf(toDate(effective_at), restarts),
                   toDate(min(effective_at))))) AS anchors
        FROM
        (
            SELECT workspace_id, effective_at, argMax(restart_period, (recorded_at, kafka_offset)) AS restarts
            FROM ledger
            WHERE kind = 'plan' AND effective_at <= now64(3)
            GROUP BY workspace_id, effective_at
        )
        GROUP BY workspace_id
    ) AS plans ON used.workspace_id = plans.workspace_id
)
GROUP BY workspace_id, period_start, period_end, table_id, column_id, pool
HAVING runs > 0 OR credits != 0
COMMENT 'credits and runs by workspace, billing period, table, column and pool; served by a projection';

CREATE OR REPLACE VIEW balances_as_of AS
SELECT workspace_id, pool, used, allowance, greatest(allowance - used, 0) AS remaining,
       greatest(used - allowance, 0) AS overage,
       multiIf(
           pool = 'enrichment' AND plan = '', 'unknown_plan',
           used >= allowance, 'exhausted',
           (allowance - used) * 100 <= (100 - arrayMin(percents)) * if(pool = 'premium', newest_grant, allowance)
               OR (below >= 0 AND below < allowance AND allowance - used <= below), 'warning',
           'ok') AS state,
       if(pool = 'premium', NULL, first_day) AS period_start, if(pool = 'premium', NULL, end_day) AS period_end, plan,
       drawn
FROM
(
    SELECT workspace_id, pool, first_day, end_day, newest_grant, drawn, in_force.4 AS plan,
           if(pool = 'premium', premium, arraySum(draw -> draw.2,
               arrayFilter(draw -> draw.1 >= first_day AND draw.1 < end_day, drawn))) AS used,
           if(pool = 'premium', granted, arrayMax(plan -> plan.5, arrayPushFront(
               arrayFilter(plan -> toDate(plan.1) > first_day, plans),
               arrayLast(plan -> toDate(plan.1) <= first_day, plans)))) AS allowance,
           multiIf(notEmpty(own_percents), own_percents, notEmpty(in_force.7), in_force.7, [50, 80, 100]) AS percents,
           if(own_below >= 0, own_below, in_force.8) AS below
    FROM
    (
        SELECT workspace_id, plans, in_force, own_percents, own_below, granted, newest_grant, drawn, premium,
               addMonths(anchor, months) AS first_day, addMonths(anchor, months + 1) AS end_day
        FROM
        (
            SELECT workspace_id, groupArrayArray(plans) AS plans, groupArrayArray(own_thresholds) AS own_percents,
                   max(own_remaining_below) AS own_below, sum(granted) AS granted, sum(newest_grant) AS newest_grant,
                   groupArrayArray(drawn) AS drawn, sum(premium) AS premium, plans[-1] AS in_force,
                   toDate({as_of:DateTime64(3, 'UTC')}) AS today,
                   if(empty(plans), toStartOfMonth(today), groupArrayArray(anchors)[-1]) AS anchor,
                   dateDiff('month', anchor, today) - (addMonths(anchor, dateDiff('month', anchor, today)) > today)
                       AS months
            FROM
            (
                SELECT workspace_id, plans, anchors, own_thresholds, own_remaining_below, granted, newest_grant,
                       [] AS drawn, 0 AS premium
                FROM accounts_as_of(as_of = {as_of:DateTime64(3, 'UTC')})
                UNION ALL
                SELECT workspace_id, [] AS plans, [] AS anchors, [] AS own_thresholds, -1 AS own_remaining_below,
                       0 AS granted, 0 AS newest_grant,
                       groupArrayIf((day, credits), pool = 'enrichment') AS drawn,
                       sumIf(credits, pool = 'premium') AS premium
                FROM
                (
                    SELECT workspace_id, day, pool, sum(credits) AS credits FROM ledger
                    WHERE kind IN ('run', 'reversal')
                      AND day <= toDate({as_of:DateTime64(3, 'UTC')} + INTERVAL 5 MINUTE)
                      AND (pool = 'premium' OR day >= toDate({as_of:DateTime64(3, 'UTC')}) - 31)
                    GROUP BY workspace_id, day, pool
                )
                GROUP BY workspace_id
            )
            GROUP BY workspace_id
        )
    )
    ARRAY JOIN ['enrichment', 'premium'] AS pool
)
COMMENT 'balances as of an instant, with every debit of its UTC day; drawn: enrichment credits by day, of 32 days';

CREATE OR REPLACE VIEW balances
(
    workspace_id LowCardinality(String) COMMENT 'whose balance',
    pool String COMMENT 'enrichment or premium',
    used Decimal(38, 3) COMMENT 'enrichment: drawn in the running billing period; premium: drawn ever. Less reversals',
    allowance Decimal(38, 3) COMMENT 'enrichment: of the running period, 0 before the first plan; premium: all grants',
    remaining Decimal(38, 3) COMMENT 'what may still be drawn',
    overage Decimal(38, 3) COMMENT 'what was drawn beyond the allowance',
    state String COMMENT 'ok, warning, exhausted, or unknown_plan before the first plan',
    period_start Nullable(Date) COMMENT 'first UTC day of the running period; empty for premium',
    period_end Nullable(Date) COMMENT 'first UTC day that is no longer in it; empty for premium',
    plan String COMMENT 'plan in force; empty before the first one'
) AS
SELECT workspace_id, pool, used, allowance, remaining, overage, state, period_start, period_end, toString(plan) AS plan
FROM balances_as_of(as_of = now64(3, 'UTC'))
COMMENT 'where each pool of each workspace stands now';

CREATE OR REPLACE VIEW alerts
(
    alert_id UUID COMMENT 'names one crossing; the same however often it was published',
    workspace_id String COMMENT 'whose limit',
    pool String COMMENT 'enrichment or premium',
    kind String COMMENT 'crossed, exhausted, recovered or period_started',
    state String COMMENT 'of the pool afterwards: ok, warning, exhausted or unknown_plan',
    used Decimal(18, 3) COMMENT 'credits drawn afterwards',
    allowance Decimal(18, 3) COMMENT 'credits that the pool offered',
    thresholds Array(UInt8) COMMENT 'percents that were crossed; those still standing when it recovered',
    remaining_below Nullable(Decimal(18, 3)) COMMENT 'the absolute line, where it was crossed',
    period_start Nullable(Date) COMMENT 'first UTC day of the billing period; empty for premium',
    period_end Nullable(Date) COMMENT 'first UTC day that is no longer in it; empty for premium',
    plan String COMMENT 'plan in force; empty before the first one',
    cause String COMMENT 'run, reversal, plan, grant or time',
    at DateTime64(3, 'UTC') COMMENT 'when its record was received, or the instant that came',
    position String COMMENT 'the record that caused it: topic[partition]@offset; empty for time',
    run_id UUID COMMENT 'the run that caused it; zeros where none did',
    seeded Bool COMMENT 'told a standing state after a start without history; notified nobody',
    published_at DateTime64(3, 'UTC') COMMENT 'when it was first published'
) AS
SELECT alert_id, workspace_id, first.1 AS pool, first.2 AS kind, first.3 AS state, first.4 AS used,
       first.5 AS allowance, first.6 AS thresholds, if(first.7 < 0, NULL, first.7) AS remaining_below,
       nullIf(first.8, toDate(0)) AS period_start, nullIf(first.9, toDate(0)) AS period_end, first.10 AS plan,
       first.11 AS cause, first.12 AS at, first.13 AS position, first.14 AS run_id, first.15 AS seeded,
       first.16 AS published_at
FROM
(
    SELECT alert_id, workspace_id,
           argMin((toString(pool), toString(kind), toString(state), used, allowance, thresholds, remaining_below,
                   period_start, period_end, toString(plan), toString(cause), at, position, run_id, seeded,
                   published_at), published_at) AS first
    FROM published_alerts
    GROUP BY alert_id, workspace_id
)
COMMENT 'limit alerts that were published, each once';

CREATE OR REPLACE VIEW reversals
(
    run_id UUID COMMENT 'the run that was reversed',
    workspace_id String COMMENT 'who got it back',
    day Date COMMENT 'UTC day of the run, which is the day of the reversal',
    pool String COMMENT 'balance that got it back',
    credits Decimal(18, 3) COMMENT 'what the run had drawn, negative; 0 for a free run',
    recorded_at DateTime64(3, 'UTC') COMMENT 'when Kafka received the reversal',
    event_id UUID COMMENT 'names the event that reversed it',
    actor String COMMENT 'who did it; empty when not said',
    position String COMMENT 'where the event lies in Kafka: topic[partition]@offset'
) AS
SELECT run_id, toString(workspace_id) AS workspace_id, day, toString(pool) AS pool, credits, recorded_at, event_id,
       toString(actor) AS actor, concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset)) AS position
FROM ledger
WHERE kind = 'reversal'
COMMENT 'runs that were taken back, each once';

CREATE OR REPLACE VIEW late_runs
(
    run_id UUID COMMENT 'the run',
    workspace_id String COMMENT 'who pays',
    table_id String COMMENT 'table of the cell',
    column_id String COMMENT 'column of the cell',
    action String COMMENT 'what ran',
    ran_at DateTime64(3, 'UTC') COMMENT 'when it ran, in a period that had ended when it came',
    recorded_at DateTime64(3, 'UTC') COMMENT 'when Kafka received it',
    pool String COMMENT 'balance that it draws: enrichment, or none for actions without a price; premium has no period',
    credits Decimal(18, 3) COMMENT 'what it drew; 0 for a free run',
    period_start Date COMMENT 'first UTC day of the period that it belongs to',
    period_end Date COMMENT 'first UTC day that is no longer in it',
    position String COMMENT 'where the event lies in Kafka: topic[partition]@offset'
) AS
SELECT run_id, workspace_id, table_id, column_id, action, ran_at, recorded_at, pool, credits, period_start, period_end,
       position
FROM
(
    SELECT run_id, runs.workspace_id AS workspace_id, table_id, column_id, action, ran_at, recorded_at, pool, credits,
           position, arrayLast(start -> start <= day, arrayPushFront(anchors, toStartOfMonth(day))) AS anchor,
           arrayFirst(start -> start > day, arrayPushBack(anchors, toDate(65535))) AS cut,
           dateDiff('month', anchor, day) - (addMonths(anchor, dateDiff('month', anchor, day)) > day) AS months,
           addMonths(anchor, months) AS period_start, least(addMonths(anchor, months + 1), cut) AS period_end
    FROM
    (
        SELECT run_id, toString(workspace_id) AS workspace_id, toString(table_id) AS table_id,
               toString(column_id) AS column_id, toString(action) AS action, ran_at, recorded_at, day,
               toString(pool) AS pool, credits,
               concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset)) AS position
        FROM ledger
        WHERE kind = 'run' AND pool != 'premium' AND toDate(recorded_at) > day
    ) AS runs
    LEFT JOIN accounts_as_of(as_of = now64(3, 'UTC')) AS accounts ON runs.workspace_id = accounts.workspace_id
)
WHERE toDate(recorded_at) >= period_end
COMMENT 'runs received at or after the end of their billing period, by the plans known now';
