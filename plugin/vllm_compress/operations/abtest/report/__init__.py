"""The report of a comparison, as JSON, as a page and as plots."""
