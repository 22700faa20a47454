-- The twin of the PostgreSQL migration of the same name. Times are RFC 3339 text in UTC.
CREATE TABLE analyses (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL UNIQUE,
    user_id TEXT,
    repo_url TEXT NOT NULL,
    head_commit TEXT,
    branch TEXT,
    shallow BOOLEAN NOT NULL DEFAULT FALSE,
    state TEXT NOT NULL CHECK (state IN ('RUNNING', 'SUCCESS', 'FAILURE', 'REVOKED', 'RETRY')),
    started_at TEXT NOT NULL,
    finished_at TEXT,
    total_contributors BIGINT,
    total_lines BIGINT,
    total_files BIGINT,
    skipped_files BIGINT,
    result TEXT,
    error TEXT,
    worker TEXT,
    attempts INTEGER NOT NULL DEFAULT 1
);

CREATE INDEX analyses_repo_url ON analyses (repo_url);
CREATE INDEX analyses_user_id ON analyses (user_id);
CREATE INDEX analyses_started_at ON analyses (started_at);

CREATE TABLE contributors (
    analysis_id BIGINT NOT NULL REFERENCES analyses (id) ON DELETE CASCADE,
    rank INTEGER NOT NULL,
    email TEXT NOT NULL,
    lines BIGINT NOT NULL,
    PRIMARY KEY (analysis_id, rank)
) WITHOUT ROWID;

CREATE INDEX contributors_email ON contributors (email);
