-- Which catalogue versions a worker has loaded: it refuses one that was changed since.
CREATE TABLE IF NOT EXISTS catalogue_versions
(
    number UInt16 COMMENT 'the version that debits carry',
    content_hash String COMMENT 'SHA-256 of what it charges and from when',
    effective_from DateTime64(3, 'UTC') COMMENT 'prices runs that ran from here on',
    file String COMMENT 'its file when it was first used',
    first_used_at DateTime64(3, 'UTC') DEFAULT now64(3) COMMENT 'when a worker first loaded it'
)
ENGINE = MergeTree
ORDER BY number
SETTINGS non_replicated_deduplication_window = 0
COMMENT 'catalogue versions in use; immutable once listed';
