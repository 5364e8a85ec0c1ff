-- The arena's log: judges, trials as they were shown, votes, and votes taken back. All results are computed from it.

CREATE TABLE IF NOT EXISTS experiments (       -- key: digest of models, items, queries and length of the rows
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, facts TEXT NOT NULL, time TEXT NOT NULL  -- facts: JSON
);
CREATE TABLE IF NOT EXISTS judges (id TEXT PRIMARY KEY, name TEXT NOT NULL, time TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (          -- a vote can be taken back until its session ends
  id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL REFERENCES experiments, judge TEXT NOT NULL REFERENCES judges,
  time TEXT NOT NULL, ended TEXT
);
CREATE TABLE IF NOT EXISTS trials (
  id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE,  -- 128 random bits; all that a browser ever learns of a trial
  experiment INTEGER NOT NULL REFERENCES experiments, judge TEXT NOT NULL REFERENCES judges,
  place INTEGER NOT NULL,                              -- 1, 2, 3 ... for each judge
  query TEXT NOT NULL, category TEXT NOT NULL,         -- the query's image_id, or its words; its object type
  left_model TEXT NOT NULL, right_model TEXT NOT NULL, -- fingerprints of the models behind row A and row B
  left_items TEXT NOT NULL, right_items TEXT NOT NULL, -- JSON lists of image_id, best first
  facts TEXT NOT NULL,                         -- JSON: picture digests of both rows, attributes shared with the query
  identical INTEGER NOT NULL DEFAULT 0,        -- 1: both rows were the same, so that nothing was shown or asked
  repeat_of INTEGER REFERENCES trials,         -- only in older logs: the same trial again, sides exchanged
  reissue_of INTEGER UNIQUE REFERENCES trials, -- only in older logs: the same trial again, after undo
  time TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS votes (             -- of one trial's votes at most one stands, the others were taken back
  id INTEGER PRIMARY KEY, trial INTEGER NOT NULL REFERENCES trials, session INTEGER NOT NULL REFERENCES sessions,
  choice TEXT NOT NULL CHECK (choice IN ('A', 'B', 'T', 'N')), time TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS revocations (
  id INTEGER PRIMARY KEY, vote INTEGER NOT NULL UNIQUE REFERENCES votes, time TEXT NOT NULL
);

CREATE INDEX IF NOT EXISTS trials_of_judge ON trials (experiment, judge, place);
CREATE INDEX IF NOT EXISTS votes_of_trial ON votes (trial);
CREATE INDEX IF NOT EXISTS choices_of_session ON votes (session, choice);
DROP INDEX IF EXISTS trials_of_type;           -- of older versions

CREATE TRIGGER IF NOT EXISTS trials_update BEFORE UPDATE ON trials
  BEGIN SELECT RAISE(ABORT, 'trials are insert-only'); END;
CREATE TRIGGER IF NOT EXISTS trials_delete BEFORE DELETE ON trials
  BEGIN SELECT RAISE(ABORT, 'trials are insert-only'); END;
CREATE TRIGGER IF NOT EXISTS votes_update BEFORE UPDATE ON votes
  BEGIN SELECT RAISE(ABORT, 'votes are insert-only'); END;
CREATE TRIGGER IF NOT EXISTS votes_delete BEFORE DELETE ON votes
  BEGIN SELECT RAISE(ABORT, 'votes are insert-only'); END;
CREATE TRIGGER IF NOT EXISTS revocations_update BEFORE UPDATE ON revocations
  BEGIN SELECT RAISE(ABORT, 'revocations are insert-only'); END;
CREATE TRIGGER IF NOT EXISTS revocations_delete BEFORE DELETE ON revocations
  BEGIN SELECT RAISE(ABORT, 'revocations are insert-only'); END;
