-- How many workers and children died while they were at it, since it last ended otherwise.
ALTER TABLE analyses ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
