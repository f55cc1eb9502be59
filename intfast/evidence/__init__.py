"""What a finished run shows: the arms of a comparison, the paper's tables, the report's page."""
