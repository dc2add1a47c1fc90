"""What happens to an event: `rules` decide about it, `kafka` carries it, the modules beside them keep its order."""
