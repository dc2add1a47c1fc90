-- The ledger: one row for every consumed Kafka offset. Written only by protocol P1 (sinks/ledger.py).
--
-- PARTITION BY batch_month: constant within an insert, so an insert is one block and one part, all or nothing.
-- The deduplication window must cover every insert of 240 s; the worker checks that at its start.
-- The constraint refuses an insert that rests on a mark read more than 120 s ago or before this server started:
-- after either, the tokens that make a second writer harmless may be forgotten.
--
-- Questions of one workspace cost planning more than reading, by parts, columns and expressions. So a month that
-- nothing was written to for a day becomes one part, and there are no statistics of columns: a merge builds them,
-- planning loads them, and the indexes skip more. What is read are few rows of each part, so granules are small; those
-- of a projection as well, since by their number the engine chooses between it and the table. Account rows are few
-- among many runs: granules that hold none are skipped (kind_range). So are old parts, where a worker that starts asks
-- for the last offsets (offset_range).
CREATE TABLE IF NOT EXISTS ledger
(
    topic LowCardinality(String),
    topic_id LowCardinality(String),
    kafka_partition UInt16 CODEC(ZSTD(1)),
    kafka_offset UInt64 CODEC(DoubleDelta, ZSTD(1)),
    offset_gap UInt64 DEFAULT 1 CODEC(ZSTD(1)),
    recorded_at DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    kind Enum8(
        'run' = 1, 'duplicate' = 2, 'dead_letter' = 3, 'reversal' = 4, 'plan' = 5, 'grant' = 6, 'limits' = 7),
    run_id UUID CODEC(ZSTD(1)),
    workspace_id LowCardinality(String),
    table_id LowCardinality(String),
    column_id LowCardinality(String),
    row_id String CODEC(ZSTD(1)),
    action LowCardinality(String),
    outcome Enum8('' = 0, 'data' = 1, 'no_data' = 2, 'error' = 3),
    own_api_key Bool,
    ran_at DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    day Date MATERIALIZED toDate(ran_at) CODEC(ZSTD(1)),
    triggered_by LowCardinality(String),
    actor LowCardinality(String),
    pool Enum8('none' = 1, 'enrichment' = 2, 'premium' = 3),
    credits Decimal(18, 3) CODEC(ZSTD(1)),
    reason Enum8(
        'own_api_key' = 1, 'free_action' = 2, 'error' = 3, 'no_data' = 4, 'charged_no_data' = 5, 'charged' = 6,
        'duplicate' = 7, 'too_large' = 8, 'malformed' = 9, 'misrouted' = 10, 'future_run' = 11, 'stale_run' = 12,
        'conflicting_duplicate' = 13, 'unknown_action' = 14, 'reversed' = 15, 'plan_changed' = 16,
        'premium_granted' = 17, 'limits_changed' = 18, 'unknown_run' = 19, 'unknown_plan' = 20),
    catalogue UInt16 CODEC(ZSTD(1)),
    event_id UUID CODEC(ZSTD(1)),
    effective_at DateTime64(3, 'UTC') CODEC(ZSTD(1)),
    plan LowCardinality(String),
    allowance Decimal(18, 3) CODEC(ZSTD(1)),
    restart_period Bool,
    thresholds Array(UInt8) CODEC(ZSTD(1)),
    remaining_below Decimal(18, 3) DEFAULT -1 CODEC(ZSTD(1)),
    detail String CODEC(ZSTD(1)),
    raw String CODEC(ZSTD(1)),
    raw_key String CODEC(ZSTD(1)),
    raw_headers String CODEC(ZSTD(1)),
    redrive_of String CODEC(ZSTD(1)),
    batch_month UInt32 CODEC(ZSTD(1)),
    mark_read_at DateTime64(3, 'UTC') CODEC(ZSTD(1)),
    INDEX run_id_bloom run_id TYPE bloom_filter(0.0001) GRANULARITY 1,
    INDEX kind_range kind TYPE minmax GRANULARITY 1,
    INDEX offset_range kafka_offset TYPE minmax GRANULARITY 1,
    PROJECTION marks
    (
        SELECT topic_id, kafka_partition, max(kafka_offset), min(kafka_offset), count(), sum(offset_gap),
               argMax(mark_read_at, kafka_offset)
        GROUP BY topic_id, kafka_partition
    ),
    PROJECTION usage
    (
        SELECT workspace_id, day, table_id, column_id, action, pool, kind, reason, sum(credits), count()
        GROUP BY workspace_id, day, table_id, column_id, action, pool, kind, reason
    ),
    CONSTRAINT mark_is_fresh CHECK
        mark_read_at >= now64(3) - toIntervalMillisecond(1000 * least(120, greatest(toInt64(uptime()) - 1, 0)))
)
ENGINE = MergeTree
PARTITION BY batch_month
ORDER BY (workspace_id, day, table_id, column_id, ran_at)
SETTINGS
    index_granularity = 2048,
    non_replicated_deduplication_window = 100000,
    min_age_to_force_merge_seconds = 86400,
    min_age_to_force_merge_on_partition_only = 1,
    auto_statistics_types = '';
