"""What happens to an event: decode ▸ rate ▸ decide copies ▸ rows, and the Faust application around it."""
