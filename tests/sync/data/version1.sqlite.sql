BEGIN TRANSACTION;
CREATE TABLE accounts (
	user_id VARCHAR NOT NULL, 
	revision INTEGER NOT NULL, 
	empty_lists INTEGER NOT NULL, 
	first_run_at DATETIME, 
	last_run_at DATETIME, 
	synced_at DATETIME, 
	last_error TEXT, 
	PRIMARY KEY (user_id)
);
INSERT INTO "accounts" VALUES('usr_1',2,0,'2026-11-29 01:09:46.353355','2026-11-29 01:09:46.359204','2026-11-29 01:09:46.359204',NULL);
INSERT INTO "accounts" VALUES('usr_2',1,0,'2026-11-29 01:09:46.363115','2026-11-29 01:09:46.363115','2026-11-29 01:09:46.363115',NULL);
INSERT INTO "accounts" VALUES('usr_3',0,0,'2026-11-29 01:09:46.364417','2026-11-29 01:09:46.364417',NULL,'no answer');
CREATE TABLE changes (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	user_id VARCHAR NOT NULL, 
	meeting_id VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	fields TEXT NOT NULL, 
	found_at DATETIME NOT NULL, 
	wire TEXT NOT NULL, 
	delivered_at DATETIME
);
INSERT INTO "changes" VALUES(1,'usr_1','mee_public','created','[]','2026-11-29 01:09:46.353355','{"_id": "mee_public", "meetingTypeId": "met_1", "meetingTypeName": "Discovery", "start": "2026-01-05T09:00:00.000+01:00", "end": "2026-01-05T08:30:00.000Z", "createdAt": "2026-01-01T08:30:00.000Z", "attendees": [{"email": "host@example.com", "name": "Host", "owner": true}, {"email": "guest@example.com", "name": "A Guest", "primary": true}]}','2026-11-29 01:09:46.366179');
INSERT INTO "changes" VALUES(2,'usr_1','mee_plain','created','[]','2026-11-29 01:09:46.353355','{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}','2026-11-29 01:09:46.366609');
INSERT INTO "changes" VALUES(3,'usr_1','mee_nul','created','[]','2026-11-29 01:09:46.353355','{"_id": "mee_nul", "start": "never", "note": "a\u0000b"}',NULL);
INSERT INTO "changes" VALUES(4,'usr_1','mee_canceled','created','[]','2026-11-29 01:09:46.353355','{"_id": "mee_canceled", "canceledAt": "2026-01-02T00:00:00.000Z", "end": "2026-01-05T08:30:00.000Z", "lead": {"email": "lead@example.com", "firstName": "Lea", "lastName": "D"}}',NULL);
INSERT INTO "changes" VALUES(5,'usr_1','mee_public','changed','["location"]','2026-11-29 01:09:46.359204','{"_id": "mee_public", "meetingTypeId": "met_1", "meetingTypeName": "Discovery", "start": "2026-01-05T09:00:00.000+01:00", "end": "2026-01-05T08:30:00.000Z", "createdAt": "2026-01-01T08:30:00.000Z", "attendees": [{"email": "host@example.com", "name": "Host", "owner": true}, {"email": "guest@example.com", "name": "A Guest", "primary": true}], "location": "Berlin"}',NULL);
INSERT INTO "changes" VALUES(6,'usr_1','mee_plain','disappeared','[]','2026-11-29 01:09:46.359204','{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}',NULL);
INSERT INTO "changes" VALUES(7,'usr_2','mee_plain','created','[]','2026-11-29 01:09:46.363115','{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}',NULL);
CREATE TABLE deliveries (
	user_id VARCHAR NOT NULL, 
	meeting_id VARCHAR NOT NULL, 
	lease_until FLOAT NOT NULL, 
	done_at DATETIME, 
	PRIMARY KEY (user_id, meeting_id)
);
INSERT INTO "deliveries" VALUES('usr_1','mee_public',1.79591464636687517166e+09,'2026-11-29 01:09:46.367500');
CREATE TABLE lemcal_schema (
	version INTEGER NOT NULL
);
INSERT INTO "lemcal_schema" VALUES(1);
CREATE TABLE meetings (
	user_id VARCHAR NOT NULL, 
	meeting_id VARCHAR NOT NULL, 
	meeting_type_id TEXT, 
	meeting_type_name TEXT, 
	start_at DATETIME, 
	end_at DATETIME, 
	guest_email TEXT, 
	guest_name TEXT, 
	host_email TEXT, 
	status VARCHAR NOT NULL, 
	canceled_at DATETIME, 
	created_at DATETIME, 
	first_seen_at DATETIME, 
	last_seen_at DATETIME, 
	changed_at DATETIME, 
	problem TEXT, 
	digest VARCHAR NOT NULL, 
	wire TEXT, 
	PRIMARY KEY (user_id, meeting_id), 
	FOREIGN KEY(user_id) REFERENCES accounts (user_id)
);
INSERT INTO "meetings" VALUES('usr_1','mee_public','met_1','Discovery','2026-01-05 08:00:00.000000','2026-01-05 08:30:00.000000','guest@example.com','A Guest','host@example.com','booked',NULL,'2026-01-01 08:30:00.000000','2026-11-29 01:09:46.353355',NULL,'2026-11-29 01:09:46.359204',NULL,'7e30946c347529e78940c3cb2ecb622e','{"_id": "mee_public", "meetingTypeId": "met_1", "meetingTypeName": "Discovery", "start": "2026-01-05T09:00:00.000+01:00", "end": "2026-01-05T08:30:00.000Z", "createdAt": "2026-01-01T08:30:00.000Z", "attendees": [{"email": "host@example.com", "name": "Host", "owner": true}, {"email": "guest@example.com", "name": "A Guest", "primary": true}], "location": "Berlin"}');
INSERT INTO "meetings" VALUES('usr_1','mee_plain',NULL,NULL,NULL,'2026-02-05 08:30:00.000000',NULL,NULL,NULL,'disappeared',NULL,NULL,'2026-11-29 01:09:46.353355','2026-11-29 01:09:46.353355','2026-11-29 01:09:46.359204',NULL,'ec08555fd045e3b63797c6a675720bb3','{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}');
INSERT INTO "meetings" VALUES('usr_1','mee_nul',NULL,NULL,NULL,NULL,NULL,NULL,NULL,'booked',NULL,NULL,'2026-11-29 01:09:46.353355',NULL,'2026-11-29 01:09:46.353355','start: expected an ISO 8601 time with an offset, got str','0cddbe8c84a3550d9ed5ba68a6fcac99','{"_id": "mee_nul", "start": "never", "note": "a\u0000b"}');
INSERT INTO "meetings" VALUES('usr_1','mee_canceled',NULL,NULL,NULL,'2026-01-05 08:30:00.000000','lead@example.com','Lea D',NULL,'canceled','2026-01-02 00:00:00.000000',NULL,'2026-11-29 01:09:46.353355',NULL,'2026-11-29 01:09:46.353355',NULL,'be60535ff527fafb3df7e225685bc996','{"_id": "mee_canceled", "canceledAt": "2026-01-02T00:00:00.000Z", "end": "2026-01-05T08:30:00.000Z", "lead": {"email": "lead@example.com", "firstName": "Lea", "lastName": "D"}}');
INSERT INTO "meetings" VALUES('usr_2','mee_plain',NULL,NULL,NULL,'2026-02-05 08:30:00.000000',NULL,NULL,NULL,'booked',NULL,NULL,'2026-11-29 01:09:46.363115',NULL,'2026-11-29 01:09:46.363115',NULL,'ec08555fd045e3b63797c6a675720bb3','{"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}');
CREATE INDEX changes_pending ON changes (user_id, seq) WHERE delivered_at IS NULL;
CREATE INDEX meetings_guest_email ON meetings (guest_email);
CREATE INDEX meetings_start_at ON meetings (start_at);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('changes',7);
COMMIT;
