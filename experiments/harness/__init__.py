"""The machinery of tables, claims and figures; it imports none of them, except for `declarations`."""
