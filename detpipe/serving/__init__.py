"""A trained detector for others to use: a server that answers requests, and a page to try it on."""
