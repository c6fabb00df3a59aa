"""What the commands look at: outs and their damage, runs, disk, speed, kept state, the machine."""
