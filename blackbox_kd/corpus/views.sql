-- Views for people. `blackbox-kd sql "from spend"`.

-- Questions with an answer: a text, or a scorer's logprobs of the text that they name.
CREATE OR REPLACE VIEW answered AS
SELECT request_key FROM completions
UNION ALL
SELECT r.request_key FROM requests r
JOIN logprobs l ON l.completion_id = r.completion_id
               AND l.scorer = r.model || '@' || coalesce(r.context_hash::VARCHAR, 'bare')
WHERE r.purpose = 'score';

-- Asked for, not answered and not given up.
CREATE OR REPLACE VIEW pending AS
SELECT r.* FROM requests r
ANTI JOIN answered a USING (request_key)
ANTI JOIN dead_letters d USING (request_key)
WHERE r.purpose <> 'probe';

-- Whole teacher answers to train prompts, of every teacher and private prompt.
CREATE OR REPLACE VIEW teacher_rows AS
SELECT p.prompt_id, p.messages, c.completion_id, c.text, r.model, r.context_hash, r.sample_idx, c.choice_idx,
       (r.body->>'temperature')::DOUBLE AS temperature
FROM completions c
JOIN requests r USING (request_key)
JOIN prompts p ON p.prompt_id = c.prompt_id
WHERE c.author = 'teacher' AND r.purpose = 'sample' AND p.split = 'train' AND c.finish_reason = 'stop'
  AND regexp_matches(c.text, '\S');

-- The sequence-level training set: the teacher and private prompt of the last run only, without what it dropped.
CREATE OR REPLACE VIEW sft AS
SELECT t.* FROM teacher_rows t
SEMI JOIN (SELECT model, context_hash FROM runs ORDER BY started_at DESC LIMIT 1) USING (model, context_hash)
ANTI JOIN (SELECT completion_id FROM curation
           WHERE action = 'drop' AND run_id = (SELECT run_id FROM runs ORDER BY started_at DESC LIMIT 1))
          USING (completion_id);

-- The student's own samples.
CREATE OR REPLACE VIEW rollouts AS
SELECT c.run_id, c.round, c.policy, c.completion_id, p.messages, c.text, c.finish_reason, c.completion_tokens
FROM completions c JOIN prompts p USING (prompt_id)
JOIN requests r USING (request_key)
WHERE c.author = 'student' AND r.purpose = 'rollout';

-- What the student wrote beside what the teacher made of it.
CREATE OR REPLACE VIEW pairs AS
SELECT f.run_id, f.round, f.kind, p.messages, s.text AS rejected, t.text AS chosen, s.completion_id
FROM feedback f
JOIN completions s ON s.completion_id = f.completion_id
JOIN completions t ON t.completion_id = f.target_completion_id
JOIN prompts p ON p.prompt_id = s.prompt_id;

-- Calls that somebody may send a bill for: all but those to a server of the student's own.
CREATE OR REPLACE VIEW calls AS
SELECT a.*, r.purpose, r.model, r.body
FROM attempts a LEFT JOIN requests r USING (request_key)
WHERE r.purpose IS DISTINCT FROM 'rollout';

-- What each run was billed for; `unknown` was in flight when a process or a connection died.
CREATE OR REPLACE VIEW spend AS
SELECT run_id, purpose, model, count(*) AS calls, count(*) FILTER (c.billed) AS billed,
       count(*) FILTER (c.billed IS NULL) AS unknown, count(*) FILTER (status = 429) AS rate_limited,
       sum(c.prompt_tokens)::BIGINT AS prompt_tokens, sum(c.completion_tokens)::BIGINT AS completion_tokens,
       sum(c.cost_usd) AS cost_usd
FROM calls c
GROUP BY ALL;

-- One row a token.
CREATE OR REPLACE VIEW token_logprobs AS
SELECT l.completion_id, l.scorer, t.position, l.token_ids[t.position] AS token_id, v.text AS token,
       l.token_logprobs[t.position] AS logprob, l.missing_mass[t.position] AS missing_mass
FROM logprobs l, unnest(range(1, len(l.token_ids) + 1)) AS t(position)
LEFT JOIN vocab v ON v.model = regexp_replace(l.scorer, '@[^@]*$', '') AND v.token_id = l.token_ids[t.position];

-- One row an alternative; rank 1 is the likeliest.
CREATE OR REPLACE VIEW top_logprobs AS
SELECT l.completion_id, l.scorer, (t.slot // l.k) + 1 AS position, (t.slot % l.k) + 1 AS rank,
       l.top_ids[t.slot + 1] AS token_id, v.text AS token, l.top_logprobs[t.slot + 1] AS logprob
FROM logprobs l, unnest(range(0, len(l.top_ids))) AS t(slot)
LEFT JOIN vocab v ON v.model = regexp_replace(l.scorer, '@[^@]*$', '') AND v.token_id = l.top_ids[t.slot + 1]
WHERE l.k > 0 AND l.top_ids[t.slot + 1] IS NOT NULL;

-- Evaluation by checkpoint, a table for each set_id: rows of different ones do not compare.
CREATE OR REPLACE VIEW leaderboard AS
SELECT set_id, run_id, split, name, checkpoint, value, lo, hi
FROM metrics WHERE stage = 'evaluate'
ORDER BY set_id, split, name, run_id, round, checkpoint;
