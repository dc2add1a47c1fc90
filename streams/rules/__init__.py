"""What an event means, by the charge rules. Every module here is pure: no I/O, no clock, no chance."""
