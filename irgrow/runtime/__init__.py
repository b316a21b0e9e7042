"""Running and growing compiled networks."""
