"""What those who run a project see and change: people, links, progress, and what was written."""
