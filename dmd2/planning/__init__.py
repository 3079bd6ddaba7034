"""What a run or a table takes, told before anything is queued: jobs, operations, memory, GPU-hours, files and disk."""
