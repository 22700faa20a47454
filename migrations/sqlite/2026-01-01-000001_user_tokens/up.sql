-- The twin of the PostgreSQL migration of the same name.
CREATE TABLE user_tokens (
    user_id TEXT NOT NULL,
    host TEXT NOT NULL,
    ciphertext TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (user_id, host)
);
