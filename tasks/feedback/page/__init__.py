"""The page on which people compare answers, and the one of those who run a project."""
