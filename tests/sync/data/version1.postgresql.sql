CREATE TABLE accounts (
    user_id character varying NOT NULL,
    revision integer NOT NULL,
    empty_lists integer NOT NULL,
    first_run_at timestamp with time zone,
    last_run_at timestamp with time zone,
    synced_at timestamp with time zone,
    last_error text
);
CREATE TABLE changes (
    seq bigint NOT NULL,
    user_id character varying NOT NULL,
    meeting_id character varying NOT NULL,
    kind character varying NOT NULL,
    fields text NOT NULL,
    found_at timestamp with time zone NOT NULL,
    wire text NOT NULL,
    delivered_at timestamp with time zone
);
CREATE SEQUENCE changes_seq_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE changes_seq_seq OWNED BY changes.seq;
CREATE TABLE deliveries (
    user_id character varying NOT NULL,
    meeting_id character varying NOT NULL,
    lease_until double precision NOT NULL,
    done_at timestamp with time zone
);
CREATE TABLE lemcal_schema (
    version integer NOT NULL
);
CREATE TABLE meetings (
    user_id character varying NOT NULL,
    meeting_id character varying NOT NULL,
    meeting_type_id text,
    meeting_type_name text,
    start_at timestamp with time zone,
    end_at timestamp with time zone,
    guest_email text,
    guest_name text,
    host_email text,
    status character varying NOT NULL,
    canceled_at timestamp with time zone,
    created_at timestamp with time zone,
    first_seen_at timestamp with time zone,
    last_seen_at timestamp with time zone,
    changed_at timestamp with time zone,
    problem text,
    digest character varying NOT NULL,
    wire text
);
ALTER TABLE ONLY changes ALTER COLUMN seq SET DEFAULT nextval('changes_seq_seq'::regclass);
INSERT INTO accounts VALUES ('usr_1', 2, 0, '2026-11-29 01:09:47.338587+00', '2026-11-29 01:09:47.37512+00', '2026-11-29 01:09:47.37512+00', NULL);
INSERT INTO accounts VALUES ('usr_2', 1, 0, '2026-11-29 01:09:47.379485+00', '2026-11-29 01:09:47.379485+00', '2026-11-29 01:09:47.379485+00', NULL);
INSERT INTO accounts VALUES ('usr_3', 0, 0, '2026-11-29 01:09:47.382235+00', '2026-11-29 01:09:47.382235+00', NULL, 'no answer');
INSERT INTO changes VALUES (3, 'usr_1', 'mee_nul', 'created', '[]', '2026-11-29 01:09:47.338587+00', '{"_id": "mee_nul", "start": "never", "note": "a\u0000b"}', NULL);
INSERT INTO changes VALUES (4, 'usr_1', 'mee_canceled', 'created', '[]', '2026-11-29 01:09:47.338587+00', '{"_id": "mee_canceled", "canceledAt": "2026-01-02T00:00:00.000Z", "end": "2026-01-05T08:30:00.000Z", "lead": {"email": "lead@example.com", "firstName": "Lea", "lastName": "D"}}', NULL);
INSERT INTO changes VALUES (5, 'usr_1', 'mee_public', 'changed', '["location"]', '2026-11-29 01:09:47.37512+00', '{"_id": "mee_public", "meetingTypeId": "met_1", "meetingTypeName": "Discovery", "start": "2026-01-05T09:00:00.000+01:00", "end": "2026-01-05T08:30:00.000Z", "createdAt": "2026-01-01T08:30:00.000Z", "attendees": [{"email": "host@example.com", "name": "Host", "owner": true}, {"email": "guest@example.com", "name": "A Guest", "primary": true}], "location": "Berlin"}', NULL);
INSERT INTO changes VALUES (6, 'usr_1', 'mee_plain', 'disappeared', '[]', '2026-11-29 01:09:47.37512+00', '{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}', NULL);
INSERT INTO changes VALUES (7, 'usr_2', 'mee_plain', 'created', '[]', '2026-11-29 01:09:47.379485+00', '{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}', NULL);
INSERT INTO changes VALUES (1, 'usr_1', 'mee_public', 'created', '[]', '2026-11-29 01:09:47.338587+00', '{"_id": "mee_public", "meetingTypeId": "met_1", "meetingTypeName": "Discovery", "start": "2026-01-05T09:00:00.000+01:00", "end": "2026-01-05T08:30:00.000Z", "createdAt": "2026-01-01T08:30:00.000Z", "attendees": [{"email": "host@example.com", "name": "Host", "owner": true}, {"email": "guest@example.com", "name": "A Guest", "primary": true}]}', '2026-11-29 01:09:47.384378+00');
INSERT INTO changes VALUES (2, 'usr_1', 'mee_plain', 'created', '[]', '2026-11-29 01:09:47.338587+00', '{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}', '2026-11-29 01:09:47.385389+00');
INSERT INTO deliveries VALUES ('usr_1', 'mee_public', 1795914647.3860624, '2026-11-29 01:09:47.386987+00');
INSERT INTO lemcal_schema VALUES (1);
INSERT INTO meetings VALUES ('usr_1', 'mee_nul', NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'booked', NULL, NULL, '2026-11-29 01:09:47.338587+00', NULL, '2026-11-29 01:09:47.338587+00', 'start: expected an ISO 8601 time with an offset, got str', '0cddbe8c84a3550d9ed5ba68a6fcac99', '{"_id": "mee_nul", "start": "never", "note": "a\u0000b"}');
INSERT INTO meetings VALUES ('usr_1', 'mee_canceled', NULL, NULL, NULL, '2026-01-05 08:30:00+00', 'lead@example.com', 'Lea D', NULL, 'canceled', '2026-01-02 00:00:00+00', NULL, '2026-11-29 01:09:47.338587+00', NULL, '2026-11-29 01:09:47.338587+00', NULL, 'be60535ff527fafb3df7e225685bc996', '{"_id": "mee_canceled", "canceledAt": "2026-01-02T00:00:00.000Z", "end": "2026-01-05T08:30:00.000Z", "lead": {"email": "lead@example.com", "firstName": "Lea", "lastName": "D"}}');
INSERT INTO meetings VALUES ('usr_1', 'mee_public', 'met_1', 'Discovery', '2026-01-05 08:00:00+00', '2026-01-05 08:30:00+00', 'guest@example.com', 'A Guest', 'host@example.com', 'booked', NULL, '2026-01-01 08:30:00+00', '2026-11-29 01:09:47.338587+00', NULL, '2026-11-29 01:09:47.37512+00', NULL, '7e30946c347529e78940c3cb2ecb622e', '{"_id": "mee_public", "meetingTypeId": "met_1", "meetingTypeName": "Discovery", "start": "2026-01-05T09:00:00.000+01:00", "end": "2026-01-05T08:30:00.000Z", "createdAt": "2026-01-01T08:30:00.000Z", "attendees": [{"email": "host@example.com", "name": "Host", "owner": true}, {"email": "guest@example.com", "name": "A Guest", "primary": true}], "location": "Berlin"}');
INSERT INTO meetings VALUES ('usr_1', 'mee_plain', NULL, NULL, NULL, '2026-02-05 08:30:00+00', NULL, NULL, NULL, 'disappeared', NULL, NULL, '2026-11-29 01:09:47.338587+00', '2026-11-29 01:09:47.338587+00', '2026-11-29 01:09:47.37512+00', NULL, 'ec08555fd045e3b63797c6a675720bb3', '{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}');
INSERT INTO meetings VALUES ('usr_2', 'mee_plain', NULL, NULL, NULL, '2026-02-05 08:30:00+00', NULL, NULL, NULL, 'booked', NULL, NULL, '2026-11-29 01:09:47.379485+00', NULL, '2026-11-29 01:09:47.379485+00', NULL, 'ec08555fd045e3b63797c6a675720bb3', '{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}');
SELECT pg_catalog.setval('changes_seq_seq', 7, true);
ALTER TABLE ONLY accounts
    ADD CONSTRAINT accounts_pkey PRIMARY KEY (user_id);
ALTER TABLE ONLY changes
    ADD CONSTRAINT changes_pkey PRIMARY KEY (seq);
ALTER TABLE ONLY deliveries
    ADD CONSTRAINT deliveries_pkey PRIMARY KEY (user_id, meeting_id);
ALTER TABLE ONLY meetings
    ADD CONSTRAINT meetings_pkey PRIMARY KEY (user_id, meeting_id);
CREATE INDEX changes_pending ON changes USING btree (user_id, seq) WHERE (delivered_at IS NULL);
CREATE INDEX meetings_guest_email ON meetings USING btree (guest_email);
CREATE INDEX meetings_start_at ON meetings USING btree (start_at);
ALTER TABLE ONLY meetings
    ADD CONSTRAINT meetings_user_id_fkey FOREIGN KEY (user_id) REFERENCES accounts(user_id);
