"""What a checkout is: its places, its stages, its work in progress, its locks, its code, and what git and DVC know of it."""
