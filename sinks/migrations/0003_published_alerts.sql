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
