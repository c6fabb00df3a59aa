"""Starting a training: its ranks, on one machine or several, their job, and how they communicate."""
