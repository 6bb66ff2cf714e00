"""Files, errors and optional packages: what every other room may use, and nothing of theirs."""
