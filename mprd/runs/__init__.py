"""What a run leaves: its folder, its lock, console lines, pages."""
