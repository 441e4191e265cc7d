"""What users see of a search: the live view while it runs, and the report at its end."""
