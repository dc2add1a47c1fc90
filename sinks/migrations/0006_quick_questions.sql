-- Questions of one workspace cost planning more than reading: by parts, by columns, by expressions.
--
-- A month that nothing was written to for a day becomes one part: a question looks at each part of the ledger. No
-- statistics of columns: a merge builds them, planning loads them, and the indexes skip more.
ALTER TABLE ledger MODIFY SETTING
    min_age_to_force_merge_seconds = 86400, min_age_to_force_merge_on_partition_only = 1, auto_statistics_types = '';

-- The days from which periods count are computed in place: nothing else of the accounts is, and no view is planned.
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
SELECT workspace_id, period_start, if(cut = toDate(0), month_end, least(month_end, cut)) AS period_end, table_id,
       column_id, pool, sum(drawn) AS credits, sum(if(kind = 'run', counted, 0)) AS runs
FROM
(
    SELECT workspace_id, table_id, column_id, pool, kind, drawn, counted, cut,
           dateDiff('month', anchor, day) - (addMonths(anchor, dateDiff('month', anchor, day)) > day) AS months,
           addMonths(anchor, months) AS period_start, addMonths(anchor, months + 1) AS month_end
    FROM
    (
        SELECT used.workspace_id AS workspace_id, day, table_id, column_id, pool, kind, drawn, counted,
               arrayLast(start -> start <= day, anchors) AS last_anchor,
               if(last_anchor = toDate(0), toStartOfMonth(day), last_anchor) AS anchor,
               arrayFirst(start -> start > day, anchors) AS cut
        FROM
        (
            SELECT workspace_id, day, table_id, column_id, pool, kind, sum(credits) AS drawn, count() AS counted
            FROM ledger
            WHERE kind IN ('run', 'reversal')
            GROUP BY workspace_id, day, table_id, column_id, pool, kind
        ) AS used
        LEFT JOIN
        (
            SELECT workspace_id, arraySort(arrayDistinct(arrayPushFront(groupArrayIf(toDate(ran_at), restarts),
                       toDate(min(ran_at))))) AS anchors
            FROM
            (
                SELECT workspace_id, ran_at, argMax(restart_period, (recorded_at, kafka_offset)) AS restarts
                FROM ledger
                WHERE kind = 'plan' AND ran_at <= now64(3)
                GROUP BY workspace_id, ran_at
            )
            GROUP BY workspace_id
        ) AS plans ON used.workspace_id = plans.workspace_id
    )
)
GROUP BY workspace_id, period_start, period_end, table_id, column_id, pool
COMMENT 'credits and runs by workspace, billing period, table, column and pool; served by a projection';
