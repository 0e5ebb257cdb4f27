"""What comes from outside and what it must look like: JSON is parsed in one place (`json_text`), a format is a table of
kinds (`kinds`) or a dataclass whose fields know their range (`record`, `ranges`)."""
