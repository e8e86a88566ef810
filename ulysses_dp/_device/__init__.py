"""Arrays, their dtypes, queues and memory on this rank's device."""
