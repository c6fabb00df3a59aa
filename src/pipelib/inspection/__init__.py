"""What the commands inspect: outs and their damage, runs, disk, speed, kept state, the machine."""
