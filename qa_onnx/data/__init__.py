"""Questions from files, folders and the hub: one reader for every command."""
