"""What this machine gives a process: memory, room on a disk, and its start."""
