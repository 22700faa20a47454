ALTER TABLE analyses DROP COLUMN deaths;
