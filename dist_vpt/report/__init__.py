"""Tables and figures of results, beside published numbers."""
