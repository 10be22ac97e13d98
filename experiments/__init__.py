"""Evidence: real training jobs and published tables; each file here runs from a checkout."""
