"""Where results go: the ledger in ClickHouse or chDB, its write protocol, its questions."""
