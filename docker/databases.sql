-- A role, and a database that it owns, for each service. It can run at every start: it creates what
-- is missing and sets the password of each role to that in the environment.
\set ON_ERROR_STOP on
\getenv prefect POSTGRES_PREFECT_PASSWORD
\getenv mlflow POSTGRES_MLFLOW_PASSWORD
\getenv feedback POSTGRES_FEEDBACK_PASSWORD

CREATE TEMPORARY TABLE wanted (name, secret) AS
VALUES ('prefect', :'prefect'), ('mlflow', :'mlflow'), ('feedback', :'feedback');

SELECT format('CREATE ROLE %I', name) FROM wanted
WHERE name NOT IN (SELECT rolname FROM pg_roles) \gexec
SELECT format('ALTER ROLE %I LOGIN PASSWORD %L', name, secret) FROM wanted \gexec
SELECT format('CREATE DATABASE %I OWNER %I', name, name) FROM wanted
WHERE name NOT IN (SELECT datname FROM pg_database) \gexec
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', name) FROM wanted \gexec

-- Prefect searches names with it. Its owner creates it, so that the owner can restore it.
\connect prefect
SET ROLE prefect;
SET client_min_messages TO warning;
CREATE EXTENSION IF NOT EXISTS pg_trgm;
