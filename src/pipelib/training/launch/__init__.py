"""Starting a training: the ranks, on one machine or several, what they are told and what they agree on."""
