-- The corpus, version 1. Append-only: a row that was paid for is never changed or deleted.
-- Ids are content hashes (first 128 bits of sha256) unless a comment says otherwise.

CREATE TABLE IF NOT EXISTS meta (
    key        VARCHAR PRIMARY KEY,   -- schema_version
    value      VARCHAR NOT NULL       -- as text
);

CREATE TABLE IF NOT EXISTS runs (
    run_id       UUID PRIMARY KEY,      -- random; belongs to the run directory and survives restarts
    run_dir      VARCHAR NOT NULL,      -- where its checkpoints are
    config       JSON NOT NULL,         -- resolved config of its last start, without keys
    model        VARCHAR NOT NULL,      -- the teacher model that it asks
    context_hash UUID NOT NULL,         -- hash of the teacher's private prompt
    version      VARCHAR NOT NULL,      -- of blackbox_kd
    started_at   TIMESTAMPTZ NOT NULL   -- last start
);

CREATE TABLE IF NOT EXISTS prompts (
    prompt_id  UUID PRIMARY KEY,        -- hash of the messages
    messages   JSON NOT NULL,           -- the conversation as the student sees it
    split      VARCHAR NOT NULL,        -- train, heldout, ood or holdback
    source     VARCHAR NOT NULL,        -- file that it came from
    meta       JSON NOT NULL,           -- what the row said under `meta`
    added_at   TIMESTAMPTZ NOT NULL     -- first seen
);

CREATE TABLE IF NOT EXISTS requests (
    request_key   UUID PRIMARY KEY,     -- hash of what is asked: wire version, endpoint, body, sample_idx
    purpose       VARCHAR NOT NULL,     -- sample, best_of_n, relabel, prefix, rubric, judge, score, fork, rollout, evaluate, win_rate, probe
    prompt_id     UUID NOT NULL,        -- the prompt that it is about
    completion_id UUID,                 -- the student's text that it is about, NULL where about none
    cut_byte      INTEGER,              -- where that text was cut (UTF-8 bytes), NULL where whole
    context_hash  UUID,                 -- hash of the teacher's private prompt, NULL for a bare request
    model         VARCHAR NOT NULL,     -- model asked for
    body          JSON NOT NULL,        -- the JSON that is sent
    sample_idx    INTEGER NOT NULL,     -- draw number for this body; 0 at temperature 0
    created_at    TIMESTAMPTZ NOT NULL  -- first asked for
);

CREATE TABLE IF NOT EXISTS attempts (
    attempt_id        UUID PRIMARY KEY,     -- random
    request_key       UUID NOT NULL,        -- the request that it tried
    run_id            UUID NOT NULL,        -- the run that pays for it
    status            INTEGER,              -- HTTP status, NULL where there was no answer
    error             VARCHAR,              -- what went wrong, NULL for an answer
    retry_after_s     DOUBLE,               -- seconds that a 429 asked to wait
    latency_s         DOUBLE,               -- seconds from sending to the end of the body
    server_request_id VARCHAR,              -- x-request-id of the reply
    prompt_tokens     INTEGER NOT NULL,     -- as billed
    completion_tokens INTEGER NOT NULL,     -- as billed, reasoning included
    cached_tokens     INTEGER NOT NULL,     -- part of prompt_tokens read from the provider's cache
    reasoning_tokens  INTEGER NOT NULL,     -- part of completion_tokens that is not shown
    cost_usd          DOUBLE,               -- NULL where the price is not known
    billed            BOOLEAN,              -- NULL where nobody can know: in flight when process or connection died
    attempted_at      TIMESTAMPTZ NOT NULL  -- when it was sent
);

CREATE TABLE IF NOT EXISTS completions (
    completion_id      UUID PRIMARY KEY,      -- hash of request_key, choice_idx, author and text
    request_key        UUID NOT NULL,         -- the request that it answers
    choice_idx         INTEGER NOT NULL,      -- index in the reply, for n > 1
    prompt_id          UUID NOT NULL,         -- the prompt that it answers
    author             VARCHAR NOT NULL,      -- teacher, student or judge
    model              VARCHAR NOT NULL,      -- model asked for
    policy             VARCHAR,               -- hash of base and adapter that wrote it, base:HASH without one, NULL for a teacher
    round              INTEGER NOT NULL,      -- 0 before the on-policy stage, then 1, 2, ...
    text               VARCHAR NOT NULL,      -- the answer
    reasoning          VARCHAR,               -- reasoning text where the endpoint shows it
    finish_reason      VARCHAR NOT NULL,      -- stop, length, content_filter, ...
    served_model       VARCHAR,               -- model that the reply names (aliases drift)
    system_fingerprint VARCHAR,               -- of the serving system, where given
    prompt_tokens      INTEGER NOT NULL,      -- of the reply, on its first choice only
    completion_tokens  INTEGER NOT NULL,      -- of the reply, on its first choice only
    cached_tokens      INTEGER NOT NULL,      -- of the reply, on its first choice only
    reasoning_tokens   INTEGER NOT NULL,      -- of the reply, on its first choice only
    run_id             UUID NOT NULL,         -- run that received it
    created_at         TIMESTAMPTZ NOT NULL,  -- when it was received
    UNIQUE (request_key, choice_idx)
);

CREATE TABLE IF NOT EXISTS logprobs (
    completion_id  UUID NOT NULL,       -- the completion that is scored
    scorer         VARCHAR NOT NULL,    -- model@context_hash that scored it; for a student model@policy
    token_ids      INTEGER[] NOT NULL,  -- T scorer tokens; below 0 where the endpoint gives no ids and we count them
    token_logprobs FLOAT[] NOT NULL,    -- T natural logprobs, rounded to 1e-3, NULL where the endpoint hides one
    top_ids        INTEGER[] NOT NULL,  -- T * k alternatives, row by row, NULL where fewer than k were shown
    top_logprobs   FLOAT[] NOT NULL,    -- T * k natural logprobs, rounded to 1e-3
    k              INTEGER NOT NULL,    -- alternatives a token; 0 where only the sampled token was scored
    missing_mass   FLOAT[] NOT NULL,    -- T times 1 - sum of exp(top_logprobs), before rounding
    PRIMARY KEY (completion_id, scorer)
);

CREATE TABLE IF NOT EXISTS vocab (
    model    VARCHAR NOT NULL,          -- the scorer's model
    token_id INTEGER NOT NULL,          -- the endpoint's id, or -1, -2, ... in order of arrival where it gives none
    text     VARCHAR NOT NULL,          -- as the endpoint shows it
    bytes    BLOB,                      -- UTF-8 bytes, NULL where the endpoint gives none
    PRIMARY KEY (model, token_id)
);

CREATE TABLE IF NOT EXISTS feedback (
    feedback_id          UUID PRIMARY KEY,      -- hash of completion, kind, scorer, target, round and run
    completion_id        UUID NOT NULL,         -- the student's text
    kind                 VARCHAR NOT NULL,      -- rewrite, afresh, grade, ...
    value                DOUBLE,                -- a score, NULL for a text
    target_completion_id UUID,                  -- the better text, NULL for a score
    detail               JSON NOT NULL,         -- anything else
    scorer               VARCHAR NOT NULL,      -- model@context_hash that said it
    round                INTEGER NOT NULL,      -- on-policy round
    run_id               UUID NOT NULL,         -- run that asked
    created_at           TIMESTAMPTZ NOT NULL   -- when it was received
);

CREATE TABLE IF NOT EXISTS curation (
    completion_id UUID NOT NULL,        -- the teacher's answer; it stays where it is
    reason        VARCHAR NOT NULL,     -- truncated, refusal, degenerate, pii, eval_overlap, length_outlier, near_duplicate, not_best_of_n
    detail        VARCHAR NOT NULL,     -- what the rule saw; at most 40 characters of a text, and none of one with personal data that `pii` knows
    action        VARCHAR NOT NULL,     -- drop: not learnt; flag: learnt, and noted
    run_id        UUID NOT NULL,        -- the run that curated; its rows are replaced when it does so again
    created_at    TIMESTAMPTZ NOT NULL, -- when it first said so
    PRIMARY KEY (run_id, completion_id, reason)
);

CREATE TABLE IF NOT EXISTS metrics (
    run_id     UUID NOT NULL,           -- the run
    stage      VARCHAR NOT NULL,        -- sample, sft, onpolicy or evaluate
    checkpoint VARCHAR NOT NULL,        -- base, sft, round-N
    round      INTEGER NOT NULL,        -- 0 before the on-policy stage
    step       INTEGER NOT NULL,        -- optimiser step within the stage; 0 where it has none
    split      VARCHAR NOT NULL,        -- train, dev, heldout, ood, holdback
    name       VARCHAR NOT NULL,        -- teacher_nll, chrf, loss, ...
    value      DOUBLE NOT NULL,         -- nats for *_nll, 0-100 for chrf, 0-1 for shares
    lo         DOUBLE,                  -- lower end of the bootstrap 95% interval, NULL where there is none
    hi         DOUBLE,                  -- upper end
    set_id     VARCHAR NOT NULL,        -- hash of the fixed evaluation set; '' where none is used
    logged_at  TIMESTAMPTZ NOT NULL,    -- last written
    PRIMARY KEY (run_id, stage, checkpoint, round, step, split, name, set_id)
);

CREATE TABLE IF NOT EXISTS capabilities (
    model     VARCHAR NOT NULL,         -- model asked for
    base_url  VARCHAR NOT NULL,         -- where it was asked, without credentials; a GGUF file for an embedded teacher
    name      VARCHAR NOT NULL,         -- chat, top_logprobs_max, scoring, prefill, ...
    value     JSON NOT NULL,            -- what `probe` found; a new probe replaces it
    detail    VARCHAR NOT NULL,         -- how it was found, or what the endpoint said
    run_id    UUID NOT NULL,            -- run that probed
    probed_at TIMESTAMPTZ NOT NULL,     -- when
    PRIMARY KEY (model, base_url, name)
);

CREATE TABLE IF NOT EXISTS dead_letters (
    request_key UUID PRIMARY KEY,       -- the request that will not be asked again
    status      INTEGER,                -- HTTP status
    error       VARCHAR NOT NULL,       -- what the endpoint said
    run_id      UUID NOT NULL,          -- the run that gave up
    created_at  TIMESTAMPTZ NOT NULL    -- when
);
