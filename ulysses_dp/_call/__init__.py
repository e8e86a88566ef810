"""What a call is: its arrays, its options, and their checks."""
