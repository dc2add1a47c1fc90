"""What happens to an event: decode ▸ rate ▸ settle copies ▸ rows, and the Faust application around it."""
