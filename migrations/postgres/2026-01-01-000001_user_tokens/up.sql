-- Access tokens of users, encrypted with a key that is not in the database.
CREATE TABLE user_tokens (
    user_id TEXT NOT NULL,
    host TEXT NOT NULL,
    ciphertext TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (user_id, host)
);
