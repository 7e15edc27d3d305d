"""PostgreSQL: a trio-native psycopg connection, its pool, migrations, SQL by subject."""
