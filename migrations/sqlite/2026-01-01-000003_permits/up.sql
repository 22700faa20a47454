-- The twin of the PostgreSQL migration of the same name, for workers that share the file. What is a
-- function there is a transaction here (database/permits.rs): a file has one writer at a time.
CREATE TABLE permits (
    scope TEXT NOT NULL,
    holder TEXT NOT NULL,
    ends_ms BIGINT NOT NULL,
    PRIMARY KEY (scope, holder)
) WITHOUT ROWID;
