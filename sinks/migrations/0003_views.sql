-- What analysts read: views with a comment on every column, never the table behind them.

CREATE OR REPLACE VIEW debits
(
    run_id UUID COMMENT 'names the run; the same on redelivery, new on every re-run',
    workspace_id String COMMENT 'who pays',
    table_id String COMMENT 'table of the cell',
    column_id String COMMENT 'column of the cell',
    row_id String COMMENT 'row of the cell',
    action String COMMENT 'what ran; an id of the catalogue',
    outcome String COMMENT 'data, no_data or error',
    own_api_key Bool COMMENT 'ran with the own API key of the workspace',
    ran_at DateTime64(3, 'UTC') COMMENT 'when it ran; decides price and billing period',
    recorded_at DateTime64(3, 'UTC') COMMENT 'when Kafka received it',
    day Date COMMENT 'UTC day of ran_at',
    triggered_by String COMMENT 'manual, auto_update, schedule, api, waterfall, ...; empty when not said',
    actor String COMMENT 'who started it; empty when not said',
    pool String COMMENT 'balance that it draws: enrichment or premium; none for actions without a price',
    credits Decimal(18, 3) COMMENT 'what it drew; 0 for a free run',
    reason String COMMENT 'why: charged, charged_no_data, own_api_key, free_action, error, no_data',
    catalogue UInt16 COMMENT 'version of the catalogue that priced it',
    position String COMMENT 'where the event lies in Kafka: topic[partition]@offset'
) AS
SELECT run_id, toString(workspace_id) AS workspace_id, toString(table_id) AS table_id, toString(column_id) AS column_id,
       row_id, toString(action) AS action, toString(outcome) AS outcome, own_api_key, ran_at, recorded_at, day,
       toString(triggered_by) AS triggered_by, toString(actor) AS actor, toString(pool) AS pool, credits,
       toString(reason) AS reason, catalogue,
       concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset)) AS position
FROM ledger
WHERE kind = 'run'
COMMENT 'one row for every cell run, free runs included';

CREATE OR REPLACE VIEW usage_by_column
(
    workspace_id LowCardinality(String) COMMENT 'who pays',
    day Date COMMENT 'UTC day of ran_at',
    table_id LowCardinality(String) COMMENT 'table of the cells',
    column_id LowCardinality(String) COMMENT 'column of the cells',
    action LowCardinality(String) COMMENT 'what ran',
    pool Enum8('none' = 1, 'enrichment' = 2, 'premium' = 3) COMMENT 'balance that was drawn',
    reason String COMMENT 'why the runs cost what they cost',
    credits Decimal(38, 3) COMMENT 'credits drawn',
    runs UInt64 COMMENT 'cell runs, free ones included'
) AS
SELECT workspace_id, day, table_id, column_id, action, pool, toString(reason) AS reason, sum(credits) AS credits,
       count() AS runs
FROM ledger
WHERE kind = 'run'
GROUP BY workspace_id, day, table_id, column_id, action, pool, reason
COMMENT 'credits and runs by workspace, day, table, column, action, pool and reason; served by a projection';

CREATE OR REPLACE VIEW usage_by_day
(
    workspace_id LowCardinality(String) COMMENT 'who pays',
    day Date COMMENT 'UTC day of ran_at',
    pool Enum8('none' = 1, 'enrichment' = 2, 'premium' = 3) COMMENT 'balance that was drawn',
    credits Decimal(38, 3) COMMENT 'credits drawn',
    runs UInt64 COMMENT 'cell runs, free ones included'
) AS
SELECT workspace_id, day, pool, sum(credits) AS credits, count() AS runs
FROM ledger
WHERE kind = 'run'
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
    reason String COMMENT 'too_large, malformed, misrouted, future_run, stale_run, conflicting_duplicate, unknown_action',
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
WHERE kind = 'duplicate'
COMMENT 'copies of runs that are in the ledger already; each drew nothing';
