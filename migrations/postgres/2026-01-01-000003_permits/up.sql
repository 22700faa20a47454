-- Who may run now, where the broker cannot count it: running tasks of users, the one analysis of a
-- repository, and tasks that started within the window of a rate. A row counts until its end, in
-- milliseconds by this server's clock, and is removed afterwards. Scopes are digests, so that no
-- text of a stranger is too long for the index.
CREATE TABLE permits (
    scope TEXT NOT NULL,
    holder TEXT NOT NULL,
    ends_ms BIGINT NOT NULL,
    PRIMARY KEY (scope, holder)
);

CREATE FUNCTION permits_now() RETURNS BIGINT LANGUAGE sql VOLATILE AS $$
    SELECT (extract(epoch FROM clock_timestamp()) * 1000)::BIGINT
$$;

-- Grants one permit (verdict 0), or says how many run already (1), or after how many milliseconds
-- the next may start (2). A function, so that it takes one round trip, and so that a worker that is
-- stopped in the middle holds no lock.
CREATE FUNCTION take_permit(
    run_scope TEXT, run_holder TEXT, most BIGINT, lease BIGINT,
    start_scope TEXT, task TEXT, starts BIGINT, span BIGINT,
    OUT verdict INTEGER, OUT number BIGINT
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    now_ms BIGINT;
BEGIN
    -- Only then each statement sees what whoever held the lock before has written.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'permits need the isolation level read committed';
    END IF;
    -- The letters "cele": a space of locks beside that of the migrations.
    PERFORM pg_advisory_xact_lock(1667591269, hashtext(run_scope));
    now_ms := permits_now();
    IF most > 0 AND NOT EXISTS (
        SELECT FROM permits WHERE scope = run_scope AND holder = run_holder AND ends_ms > now_ms
    ) THEN
        SELECT count(*) INTO number FROM permits WHERE scope = run_scope AND ends_ms > now_ms;
        IF number >= most THEN
            verdict := 1;
            RETURN;
        END IF;
    END IF;
    IF starts > 0 AND NOT EXISTS (
        SELECT FROM permits WHERE scope = start_scope AND holder = task AND ends_ms > now_ms
    ) THEN
        SELECT ends_ms - now_ms INTO number FROM permits
            WHERE scope = start_scope AND ends_ms > now_ms
            ORDER BY ends_ms DESC OFFSET starts - 1 LIMIT 1;
        IF FOUND THEN
            verdict := 2;
            RETURN;
        END IF;
        INSERT INTO permits VALUES (start_scope, task, now_ms + span)
            ON CONFLICT (scope, holder) DO UPDATE SET ends_ms = excluded.ends_ms;
    END IF;
    IF most > 0 THEN
        INSERT INTO permits VALUES (run_scope, run_holder, now_ms + lease)
            ON CONFLICT (scope, holder) DO UPDATE SET ends_ms = excluded.ends_ms;
    END IF;
    verdict := 0;
    number := 0;
END
$$;
