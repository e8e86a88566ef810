"""What `plan` reckons: the sizes of a call, its stages and their times, and its memory."""
