-- For every connection to the arena's log. Views are temporary: a database that is only read stays as it is.

PRAGMA synchronous = FULL;                     -- a commit is on the disk
PRAGMA foreign_keys = ON;
PRAGMA temp_store = MEMORY;

CREATE TEMP VIEW judged AS                     -- trials with their standing votes; not those that others took the place of
  SELECT t.*, v.id AS vote, v.session, v.choice
  FROM trials t LEFT JOIN votes v ON v.trial = t.id AND NOT EXISTS (SELECT 1 FROM revocations r WHERE r.vote = v.id)
  WHERE NOT EXISTS (SELECT 1 FROM trials n WHERE n.reissue_of = t.id);

CREATE TEMP VIEW decided AS                    -- standing votes for either row
  SELECT v.id, s.experiment, t.query
  FROM sessions s JOIN votes v ON v.session = s.id JOIN trials t ON t.id = v.trial
  WHERE v.choice IN ('A', 'B') AND NOT EXISTS (SELECT 1 FROM revocations r WHERE r.vote = v.id);

CREATE TEMP VIEW all_votes AS                  -- every vote ever cast; first the trials that were passed over
  SELECT t.*, t.id AS trial, t.time AS drawn, j.name AS judge_name, v.id AS vote, v.choice, v.time AS voted,
    r.time AS revoked
  FROM trials t JOIN judges j ON j.id = t.judge LEFT JOIN votes v ON v.trial = t.id
    LEFT JOIN revocations r ON r.vote = v.id
  WHERE v.id OR t.identical
  ORDER BY v.id;

CREATE TEMP VIEW state AS                      -- another one with every line of the log
  SELECT (SELECT MAX(id) FROM trials) AS trial, (SELECT MAX(id) FROM votes) AS vote,
    (SELECT MAX(id) FROM revocations) AS revocation;
