-- Account events in the same ledger: plans, premium grants, reversals, thresholds. A debit still carries no period.
--
-- kind and reason are keys of the usage projection, and ClickHouse alters no column under one: it is made anew.
ALTER TABLE ledger DROP PROJECTION IF EXISTS usage;
ALTER TABLE ledger MODIFY COLUMN kind Enum8(
    'run' = 1, 'duplicate' = 2, 'dead_letter' = 3, 'reversal' = 4, 'plan' = 5, 'grant' = 6, 'limits' = 7);
ALTER TABLE ledger MODIFY COLUMN reason Enum8(
    'own_api_key' = 1, 'free_action' = 2, 'error' = 3, 'no_data' = 4, 'charged_no_data' = 5, 'charged' = 6,
    'duplicate' = 7, 'too_large' = 8, 'malformed' = 9, 'misrouted' = 10, 'future_run' = 11, 'stale_run' = 12,
    'conflicting_duplicate' = 13, 'unknown_action' = 14, 'reversed' = 15, 'plan_changed' = 16,
    'premium_granted' = 17, 'limits_changed' = 18, 'unknown_run' = 19, 'unknown_plan' = 20);
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS event_id UUID CODEC(ZSTD(1)) AFTER catalogue;
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS effective_at DateTime64(3, 'UTC') CODEC(ZSTD(1)) AFTER event_id;
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS plan LowCardinality(String) AFTER effective_at;
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS allowance Decimal(18, 3) CODEC(ZSTD(1)) AFTER plan;
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS restart_period Bool AFTER allowance;
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS thresholds Array(UInt8) CODEC(ZSTD(1)) AFTER restart_period;
ALTER TABLE ledger ADD COLUMN IF NOT EXISTS remaining_below Decimal(18, 3) DEFAULT -1 CODEC(ZSTD(1)) AFTER thresholds;
-- Account rows are few among many runs: granules that hold none are skipped. So are old parts, where a worker that
-- starts asks for the last offsets.
ALTER TABLE ledger ADD INDEX IF NOT EXISTS kind_range kind TYPE minmax GRANULARITY 1;
ALTER TABLE ledger MATERIALIZE INDEX kind_range;
ALTER TABLE ledger ADD INDEX IF NOT EXISTS offset_range kafka_offset TYPE minmax GRANULARITY 1;
ALTER TABLE ledger MATERIALIZE INDEX offset_range;
ALTER TABLE ledger ADD PROJECTION IF NOT EXISTS usage
(
    SELECT workspace_id, day, table_id, column_id, action, pool, kind, reason, sum(credits), count()
    GROUP BY workspace_id, day, table_id, column_id, action, pool, kind, reason
);
ALTER TABLE ledger MATERIALIZE PROJECTION usage;
-- What was published on limit-alerts. Written after it was sent, so after a crash an alert may stand here twice.
CREATE TABLE IF NOT EXISTS published_alerts
(
    alert_id UUID,
    workspace_id String,
    pool Enum8('enrichment' = 2, 'premium' = 3),
    kind LowCardinality(String),
    state LowCardinality(String),
    used Decimal(18, 3),
    allowance Decimal(18, 3),
    thresholds Array(UInt8),
    remaining_below Decimal(18, 3) DEFAULT -1,
    period_start Date,
    period_end Date,
    plan LowCardinality(String),
    cause LowCardinality(String),
    at DateTime64(3, 'UTC'),
    position String,
    run_id UUID,
    seeded Bool,
    published_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = MergeTree
ORDER BY (workspace_id, at);
