"""What made the shipped files, and what measures ideas: run from a checkout, in no wheel (recipes/README.md)."""
