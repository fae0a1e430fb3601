"""Where values live, what is computed again, and what it costs."""
